"""``crmsnorm``: streams in one channel less, exactly, for every architecture that the project says it of."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PhiConfig, PhiForCausalLM, StableLmConfig, StableLmForCausalLM

from normconvert.options import Options
from normconvert.rewrites.crmsnorm import plan_crmsnorm
from normconvert.rewrites.rmsnorm import plan_rmsnorm
from normconvert.runtime import CRMSNorm
from normconvert.tracing.graph import trace
from normconvert.tracing.model_graph import trace_model
from normconvert.tracing.probes import verification_inputs
from normconvert.verification.algebra import algebra_model
from normconvert.verification.equivalence import tolerance_for
from normconvert.verification.probe_runs import plain_experts
from tests.support.equivalence import compare_models
from tests.support.zoo_cases import named_cases

CASES = named_cases()
COMPLETE = [
    *["gpt2", "gpt_neo", "opt", "gpt_neox", "gptj", "phi", "bloom", "mpt", "starcoder2", "stablelm", "olmo", "whisper"],
    *["vit", "deit", "dinov2", "clip_text", "siglip_text", "timm_vit_token", "timm_vit_layer_scale", "timm_deit3"],
    *["timm_cait", "timm_mlp_mixer"],
]
BEFORE_THE_STREAM = {"bloom": {"transformer.word_embeddings_layernorm"}}
"""A norm of the embeddings alone: what comes from outside would need an operation for this one."""
BASES = ("isometric", "paper")
QUICK = {"gpt2", "stablelm", "bloom", "whisper", "vit", "timm_vit_layer_scale"}
"""One of each way of building a stream."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in COMPLETE])
def test_the_architecture_converts_completely_and_computes_the_same(name: str) -> None:
    case = CASES[name]
    graph = trace_model(case.skeleton())
    truth = case.build().double()
    plain_experts(truth)
    probes = verification_inputs(case.skeleton(), seed=0)[:2]
    for basis in BASES:
        plan = plan_crmsnorm(graph, Options(basis=basis))
        assert plan.converted
        assert {v.path for v in plan.kept} == BEFORE_THE_STREAM.get(name, set()), {v.path: v.reason for v in plan.kept}
        converted = algebra_model(truth, plan)
        modules, paths = dict(converted.named_modules()), [v.path for v in plan.converted]
        assert all(type(modules[path]) is CRMSNorm for path in paths)
        assert _layer_norms(truth) - _layer_norms(converted) == len(paths)
        widths = _widths(converted, paths)
        errors = compare_models(truth, converted, probes)
        worst = max(errors, key=lambda key: errors[key])
        assert errors[worst] <= tolerance_for(plan), (basis, worst, errors[worst])
        inserted = {e["path"] for e in plan.modules if e["op"] == "compress" and e["side"] == "output"}
        for path in paths:
            size = next(e["size"] for e in plan.modules if e["op"] == "replace" and e["path"] == path)
            assert widths[path] == (
                size - 1,
                size if modules[path].expand and path not in inserted else size - 1,
            )
        state = truth.state_dict()
        assert set(plan.removed) <= set(state)
        assert set(plan.removed).isdisjoint(converted.state_dict())


class Headed(nn.Module):
    """A stream that is read by heads alone: 48 channels fit them, 47 do not."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads, self.write, self.read = heads, nn.Linear(5, 48), nn.Linear(48, 5)
        self.norms = nn.ModuleList(nn.LayerNorm(48) for _ in range(3))
        self.branch = nn.Linear(48, 48)

    def forward(self, x: Tensor) -> Tensor:
        x = self.write(x)
        if self.heads and x.shape[-1] % self.heads:
            raise ValueError(f"{x.shape[-1]} channels cannot be split into {self.heads} heads")
        x = x + self.branch(self.norms[0](x))
        x = x + self.branch(self.norms[1](x))
        return self.read(self.norms[2](x))


@pytest.mark.parametrize("heads", [0, 4])
def test_a_model_that_cannot_take_an_odd_width_is_refused_with_the_reason(heads: int) -> None:
    with torch.device("meta"):
        model = Headed(heads).eval()
    graph = trace(model, {"x": torch.empty(2, 3, 5, device="meta")})
    assert len(plan_rmsnorm(graph, Options()).converted) == 3
    plan = plan_crmsnorm(graph, Options())
    assert len(plan.converted) == (0 if heads else 3)
    for verdict in plan.kept:
        assert verdict.code == "width"
        assert "does not run in one channel less" in verdict.reason
        assert "47 channels cannot be split into 4 heads" in verdict.reason
    assert not heads or not (plan.tensors or plan.modules)


class Body(nn.Module):
    """Gives its stream beside what is read of it, as it is and as an image."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.write, self.branch = way, nn.Linear(5, 48), nn.Linear(48, 48)
        self.norms = nn.ModuleList(nn.LayerNorm(48) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.write(x)
        x = x + self.branch(self.norms[0](x))
        if self.way == "image":
            other = x.transpose(1, 2).reshape(x.shape[0], x.shape[2], 2, 2)
        else:
            other = x if self.way == "stream" else x + 1.0
        return self.norms[1](x)[:, 0], other


class Pooled(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.body, self.head = Body(way), nn.Linear(48, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.body(x)[0])
        return found


@pytest.mark.parametrize(("way", "count"), [("stream", 2), ("image", 2), ("other", 0)])
def test_what_a_module_gives_and_nobody_reads_may_be_narrower(way: str, count: int) -> None:
    """But for what is no part of the stream: of that another call might make something."""
    with torch.device("meta"):
        model = Pooled(way).eval()
    plan = plan_crmsnorm(trace(model, {"x": torch.empty(2, 4, 5, device="meta")}), Options())
    assert len(plan.converted) == count, plan.kept


def _with_head_norms(kind: str) -> nn.Module:
    """A language model with norms of queries and keys; two norms read the stream, and StableLM's two heads two more."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    sizes |= {"intermediate_size": 24, "vocab_size": 50, "max_position_embeddings": 64}
    if kind == "phi":
        return PhiForCausalLM(PhiConfig(**sizes, qk_layernorm=True))
    return StableLmForCausalLM(StableLmConfig(**sizes, qk_layernorm=True, use_parallel_residual=True))


@pytest.mark.parametrize("kind", ["stablelm", pytest.param("phi", marks=pytest.mark.slow)])
def test_norms_of_heads_stay_without_the_stream(kind: str) -> None:
    """`head_dim` is the width of the queries, which could be 7, and of the values, which are in no stream."""
    with torch.device("meta"):
        model = _with_head_norms(kind).eval()
    plan = plan_crmsnorm(trace_model(model), Options())
    assert len(plan.converted) == 2
    assert not [v.path for v in plan.converted if "self_attn" in v.path]
    for verdict in plan.kept:
        assert ", whether its head_dim is 8 or 7: RuntimeError: shape " in verdict.reason


def _layer_norms(model: nn.Module) -> int:
    return sum(n for kind, n in Counter(type(m).__name__ for m in model.modules()).items() if "LayerNorm" in kind)


def _widths(model: nn.Module, paths: list[str]) -> dict[str, tuple[int, int]]:
    """The channels that a norm reads and gives, filled in when the model runs."""
    found: dict[str, tuple[int, int]] = {}

    def watch(path: str) -> None:
        def hook(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
            found[path] = (args[0].shape[module.axis], output.shape[module.axis])

        model.get_submodule(path).register_forward_hook(hook)

    for path in paths:
        watch(path)
    return found
