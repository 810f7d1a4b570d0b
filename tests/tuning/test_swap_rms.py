"""Swaps of models whose norms are RMSNorms: by class or by hand, before a block, behind one, of queries and keys."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

import normconvert
from normconvert.errors import NothingToConvert
from normconvert.options import Options
from normconvert.rewrites.rmsnorm import plan_rmsnorm
from normconvert.runtime import Affine
from normconvert.tracing.graph import trace
from normconvert.tuning.norms import FrozenNorm
from normconvert.tuning.norms.frozen import first_tokens
from normconvert.tuning.norms.tokens import weights_of
from normconvert.tuning.sites import NormSite, find_sites, with_rms_norms
from normconvert.tuning.student import measure
from tests.support.perturb import perturb
from tests.support.tiny_checkpoints import save

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
METHODS = ("un", "repbn", "powernorm", "ln-free")


def llama(folder: Path, **changes: Any) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    return save(perturb(LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes})).eval()), folder)


def tokens(folder: Path, count: int = 24, length: int = 12) -> Tensor:
    ids = torch.randint(3, 64, (count, length), generator=torch.Generator().manual_seed(3))
    save_file({"input_ids": ids, "labels": ids.clone()}, folder / "tokens.safetensors")
    return ids


def swapped(source: Path, out: Path, method: str, **more: Any) -> Any:
    data = f"safetensors:{out.parent / 'tokens.safetensors'}"
    settings: dict[str, Any] = {"steps": 2, "batch_size": 4, "batches_between_checkpoints": 0, "eval_data": data} | more
    return normconvert.swap(source, out, method, data=data, **settings)


def norms_in(model: nn.Module) -> list[str]:
    kinds = [type(module).__name__ for module in model.modules()]
    return [kind for kind in kinds if "Norm" in kind or kind == "Affine"]


def perplexity(model: Any, ids: Tensor) -> float:
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, :-1]
    return math.exp(F.cross_entropy(logits.flatten(0, 1).double(), ids[:, 1:].flatten()).item())


@pytest.mark.parametrize("method", [METHODS[0], *(pytest.param(m, marks=pytest.mark.slow) for m in METHODS[1:])])
def test_a_llama_ends_without_norms(method: str, tmp_path: Path) -> None:
    """Its head is tied, so it is untied, and its linear maps gain biases, which none of them had."""
    from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM

    ids = tokens(tmp_path)
    out = tmp_path / "out"
    report = swapped(llama(tmp_path / "llama", tie_word_embeddings=True), out, method)
    assert len(report.swapped) == 5
    assert report.left == ()
    assert report.fused.algebra <= 1e-10
    assert report.fused.tolerance == 1e-10
    assert not report.notes
    model: Any = normconvert.load(out)
    assert norms_in(model) == []
    first: Any = model.model.layers[0]
    assert all(m.bias is not None for m in (first.self_attn.q_proj, first.mlp.gate_proj, model.lm_head))
    assert first.mlp.down_proj.bias is None
    # What was measured is what is loaded, not merely what the fused and the unfused folder have in common.
    assert perplexity(model, ids) == pytest.approx(report.figures["tuned"].perplexity, rel=1e-4)

    shipped: Any = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    made = [shipped.generate(ids[:1, :5], max_new_tokens=10, do_sample=False, use_cache=c) for c in (True, False)]
    assert torch.equal(*made)
    shipped.save_pretrained(tmp_path / "again")
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert torch.equal(again(ids).logits, model(ids).logits)
    # Its last norm is in the head, which the base class has not.
    with pytest.raises(ValueError, match="was not proved: convert the original as LlamaModel"):
        AutoModel.from_pretrained(out, trust_remote_code=True)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        LlamaForCausalLM.from_pretrained(out)


def test_an_unfused_llama_is_no_llama_to_the_library(tmp_path: Path) -> None:
    """Its norms have biases, which the plain class would leave out, and take the weights for an RMSNorm's."""
    from transformers import LlamaForCausalLM

    tokens(tmp_path)
    out = tmp_path / "out"
    report = swapped(llama(tmp_path / "llama"), out, "repbn", steps=0, fuse=False)
    assert len(report.left) == 5
    model = normconvert.load(out)
    assert sum(isinstance(m, Affine) for m in model.modules()) == 5
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        LlamaForCausalLM.from_pretrained(out)


@pytest.mark.slow
def test_norms_that_stay_cast_to_float32_as_before(tmp_path: Path) -> None:
    tokens(tmp_path)
    report = swapped(llama(tmp_path / "llama"), tmp_path / "out", "un", steps=0, norms=("*.post_attention_layernorm",))
    assert report.swapped == tuple(f"model.layers.{i}.post_attention_layernorm" for i in range(2))
    assert set(report.left) == {"model.norm", *(f"model.layers.{i}.input_layernorm" for i in range(2))}
    assert report.fused.tolerance == 1e-5
    model = normconvert.load(tmp_path / "out")
    assert norms_in(model) == ["LlamaRMSNorm"] * 3


@pytest.mark.slow
@pytest.mark.parametrize("method", ["repbn", "ln-free"])
def test_post_norms_and_norms_of_queries_and_keys_move_into_what_is_before_them(method: str, tmp_path: Path) -> None:
    """Gemma 3 has both, and weights to which one is added."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    ids = tokens(tmp_path)
    config = Gemma3TextConfig(**SIZES, head_dim=8, query_pre_attn_scalar=8)
    gemma = save(perturb(Gemma3ForCausalLM(config).eval()), tmp_path / "gemma")
    report = swapped(gemma, tmp_path / "out", method)
    assert len(report.swapped) == 13
    assert report.left == ()
    assert report.fused.algebra <= 1e-10
    said = {v.path: v.reason for v in report.plan.verdicts}
    assert "fused into `model.layers.0.self_attn.q_proj` before it" in said["model.layers.0.self_attn.q_norm"]
    assert "fused into `model.layers.1.mlp.down_proj` before it" in said["model.layers.1.post_feedforward_layernorm"]
    model = normconvert.load(tmp_path / "out")
    assert norms_in(model) == []
    assert perplexity(model, ids) == pytest.approx(report.figures["tuned"].perplexity, rel=1e-4)


class ByHand(nn.Module):
    """An RMSNorm with ``weight + 1``, written out."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * (1 + self.weight)


class Net(nn.Module):
    """An embedding, an RMSNorm, a linear map, and whatever stands before the head."""

    def __init__(self, inline: bool = False, shared: bool = False) -> None:
        super().__init__()
        self.embed, self.norm, self.up = nn.Embedding(11, 8), ByHand(8), nn.Linear(8, 8)
        self.last, self.head = nn.RMSNorm(8), nn.Linear(8, 11)
        self.inline, self.shared = inline, shared

    def forward(self, ids: Tensor) -> Mapping[str, Tensor]:
        x = self.embed(ids)
        x = x + self.up(self.norm(x))
        x = F.rms_norm(x, (8,)) if self.inline else self.last(x)
        return {"logits": self.head(x * self.norm.weight if self.shared else x)}


def sites_of(net: nn.Module) -> tuple[dict[str, NormSite], dict[str, str]]:
    """The sites of a network, and why each norm that is none is none."""
    ids = {"ids": torch.zeros(2, 5, dtype=torch.int64, device="meta")}
    graph = trace(net.to("meta"), ids)
    plan = with_rms_norms(graph, plan_rmsnorm(graph, Options()))
    return {site.path: site for site in find_sites(graph, plan)}, {v.path: v.reason for v in plan.verdicts}


def test_norms_by_class_and_by_hand_are_found() -> None:
    sites, _ = sites_of(Net())
    assert set(sites) == {"norm", "last"}
    assert sites["norm"].offset == 1
    assert sites["norm"].eps == 1e-5
    assert sites["last"].eps == torch.finfo(torch.float32).eps  # torch's, where none is given
    assert sites["last"].role == "final"
    assert not any(site.centred for site in sites.values())
    assert all(site.mean_free for site in sites.values())


def test_norms_that_cannot_be_swapped_say_why() -> None:
    sites, reasons = sites_of(Net(inline=True))
    assert set(sites) == {"norm"}
    assert reasons[""].startswith("it is called inside `Net`, not as a module of its own")
    sites, reasons = sites_of(Net(shared=True))
    assert set(sites) == {"last"}
    assert "uses `norm.weight`, past the calls of the module" in reasons["norm"]


def test_a_model_without_any_such_norm_says_so(tmp_path: Path) -> None:
    with pytest.raises(NothingToConvert, match="it has no LayerNorm and no RMSNorm"):
        normconvert.swap("demo:convnet", tmp_path / "out", "un", data="demo:")


def test_the_frozen_divisor_of_an_rms_norm_is_the_root_of_the_mean_square() -> None:
    torch.manual_seed(0)
    sites, _ = sites_of(Net())
    x = torch.randn(3, 5, 8, dtype=torch.float64) + 2
    norm = ByHand(8).double()
    teacher = nn.ModuleDict({"norm": norm})
    teacher.forward = lambda ids: norm(ids)
    moments = measure(teacher, [sites["norm"]], iter([{"ids": x}]))["norm"]
    sigma = (x.square().mean(-1) + 1e-5).sqrt()
    assert moments.first / moments.n_first == pytest.approx(float(sigma[:, 0].mean()))
    assert moments.deviation / moments.n_rest == pytest.approx(float(sigma[:, 1:].mean()))
    frozen = FrozenNorm(8, 1e-5, centred=False).double()
    frozen.calibrate(moments)
    frozen.freeze()
    frozen.merge_first()
    torch.testing.assert_close(frozen.eval()(x), x / sigma[:, 1:].mean())


def test_norms_of_queries_and_keys_see_the_mask_of_their_tokens() -> None:
    mask = torch.tensor([[False, True, True], [True, True, True]])
    for shape, along in (((2, 3, 5, 8), mask[:, :, None]), ((2, 5, 3, 8), mask[:, None, :])):
        weight = weights_of(mask, torch.zeros(shape), -1)
        assert weight is not None
        assert torch.equal(weight.reshape(shape[:3]).bool(), along.expand(shape[:3]))
    assert weights_of(mask, torch.zeros(2, 3, 3, 8), -1) is None  # as many heads as positions
    assert first_tokens(torch.zeros(2, 3, 5, 8), -1, mask) is None  # the first head is no first position
    assert first_tokens(torch.zeros(2, 3, 8), -1, mask) is not None
