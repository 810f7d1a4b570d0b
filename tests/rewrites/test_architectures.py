"""Every architecture that the project makes a claim about converts as claimed, exactly, with perturbed weights."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from normconvert.options import Options
from normconvert.rewrites.planning import difference, plan_model, planned
from normconvert.tracing.probes import verification_inputs
from normconvert.verification.algebra import algebra_model
from normconvert.verification.equivalence import tolerance_for
from normconvert.verification.probe_runs import plain_experts
from tests.support.equivalence import compare_models
from tests.support.zoo_cases import COMPLETE, NONE, PARTIAL, NamedCase, named_cases

CASES = named_cases()
QUICK = [
    "gpt2",
    "gptj",
    "bloom",
    "mpt",
    "falcon_new_decoder",
    "stablelm",
    "olmo",
    "whisper",
    "vit",
    "segformer",
    "siglip_text",
    "timm_vit_layer_scale",
    "timm_cait",
    "opt_350m",
    "llama",
    "roberta_prelayernorm",
    "swin_hf",
    "timm_mlp_mixer",
    "timm_eva",
    "timm_mlp_mixer_min_gain_1",
    "clip_vision_shifted",
]
"""One of each way of building a stream; the tests of every other architecture are slow ones, and a sweep of all stands
in docs/coverage.md."""
EACH = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]


def outcome(converted: int, kept: int) -> str:
    return NONE if not converted else PARTIAL if kept else COMPLETE


def test_the_quick_cases_are_cases() -> None:
    assert set(QUICK) <= CASES.keys()


@pytest.mark.parametrize("name", EACH)
def test_the_architecture_converts_as_claimed_and_computes_the_same(name: str) -> None:
    case: NamedCase = CASES[name]
    options = Options(**case.options)
    plan = plan_model(case.skeleton(), options)
    kept = {v.path: v.reason for v in plan.kept}
    assert outcome(len(plan.converted), len(plan.kept)) == case.expect, kept
    assert all(reason.strip().endswith(".") and len(reason) > 20 for reason in kept.values()), kept

    truth = case.build().double()
    before = Counter(type(m).__name__ for m in truth.modules())
    converted = algebra_model(truth, plan)
    replaced = {v.path for v in plan.converted}
    modules = dict(converted.named_modules())
    assert all(type(modules[path]).__name__ == "RMSNorm" for path in replaced)
    after = Counter(type(m).__name__ for m in converted.modules())
    assert after["RMSNorm"] - before["RMSNorm"] == len(replaced)
    assert {k: v.shape for k, v in converted.state_dict().items()} == {
        k: v.shape for k, v in truth.state_dict().items()
    }

    plain_experts(truth)
    probes = verification_inputs(case.skeleton(), seed=0)[:3]
    errors = compare_models(truth, converted, probes, outputs_shift_allowed=options.allow_shifted_outputs)
    assert errors, "no output was compared"
    worst = max(errors, key=lambda key: errors[key] if errors[key] == errors[key] else float("inf"))
    assert errors[worst] <= tolerance_for(plan), (worst, errors[worst])


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_edited_model_is_the_old_one(name: str) -> None:
    options = Options(**CASES[name].options)
    plan, graph = planned(CASES[name].skeleton(), options, "rmsnorm")
    assert difference(graph, plan, options) == ""


REASONS = {
    "bert": "bert.encoder.layer.0.attention.self.query` reads the normalised stream directly (Post-LN)",
    "opt_350m": "(Post-LN)",
    "modernbert": "Wqkv` reads the normalised stream directly",
    "persimmon": "reads it directly",
    "clip_vision": "the model returns it as `last_hidden_state`",
    "dpt": "readout_projects.0.0` reads it directly",
    "timm_hiera": "amax",
    "timm_convnext": "conv_dw",
}


@pytest.mark.parametrize("name", [n for n in REASONS if n in CASES])
def test_what_stays_is_refused_for_the_right_reason(name: str) -> None:
    plan = plan_model(CASES[name].skeleton(), Options(**CASES[name].options))
    assert any(REASONS[name] in v.reason for v in plan.kept), [v.reason for v in plan.kept]


def test_a_modality_that_no_traced_input_reaches_is_no_licence_to_convert() -> None:
    class Unread(torch.nn.Module):
        """A table that writes into the stream only for inputs that no probe gives."""

        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Linear(12, 8)
            self.other = torch.nn.Linear(12, 8)
            self.norm = torch.nn.LayerNorm(8)

        def forward(self, x: torch.Tensor, use_other: bool = False) -> torch.Tensor:
            y = self.other(x) if use_other else self.embed(x)
            result: torch.Tensor = self.norm(y)
            return result

    from normconvert.rewrites.rmsnorm import plan_rmsnorm
    from normconvert.tracing.graph import trace

    with torch.device("meta"):
        model = Unread().eval()
    plan = plan_rmsnorm(trace(model, {"x": torch.empty(2, 12, device="meta")}), Options())
    assert not plan.converted
    assert "`other.weight` fits this stream, and no traced input makes the model use it" in plan.kept[0].reason


def test_a_norm_that_is_called_with_more_than_its_input_is_refused() -> None:
    class Conditional(torch.nn.LayerNorm):
        """Ignores its second argument, which a replacement would not take."""

        def forward(self, input: torch.Tensor, condition: None = None) -> torch.Tensor:
            return super().forward(input)

    class Model(torch.nn.Module):
        def __init__(self, more: bool) -> None:
            super().__init__()
            self.embed = torch.nn.Linear(12, 8)
            self.norm = Conditional(8)
            self.more = more

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.embed(x)
            result: torch.Tensor = self.norm(y, None) if self.more else self.norm(y)
            return result

    from normconvert.rewrites.rmsnorm import plan_rmsnorm
    from normconvert.tracing.graph import trace

    for more in (False, True):
        with torch.device("meta"):
            model = Model(more).eval()
        plan = plan_rmsnorm(trace(model, {"x": torch.empty(2, 12, device="meta")}), Options())
        assert bool(plan.converted) is not more
