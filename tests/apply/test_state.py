"""`apply_plan`: a plan and a state dict give what converting the model gives, or one line that says why not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import normconvert
from normconvert.errors import InputError
from normconvert.runtime import apply_module_edits
from tests.support.library_models import NanoGPT, ids, lightning
from tests.support.perturb import perturb

CALL = {"idx": ids()}
State = dict[str, Tensor]


def gpt(layers: int = 1, seed: int = 0) -> NanoGPT:
    torch.manual_seed(seed)
    model = NanoGPT(layers=layers)
    perturb(model, seed)
    return model.bfloat16()


@pytest.mark.parametrize("method", ["rmsnorm", "crmsnorm", "fold", "rotate"])
def test_a_state_dict_becomes_that_of_the_converted_model(method: str, tmp_path: Path) -> None:
    converted, report = normconvert.convert_model(gpt(), method, example_inputs=CALL, verify=None)
    report.plan.save(tmp_path / "plan.json")
    assert normconvert.Plan.load(tmp_path / "plan.json") == report.plan
    before = gpt().state_dict()
    found = normconvert.apply_plan(before, tmp_path / "plan.json")
    expected = converted.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert {value.dtype for value in found.values()} == {torch.bfloat16}
    assert all(torch.equal(value, gpt().state_dict()[name]) for name, value in before.items()), "what was given stays"
    other = gpt(seed=7)  # another checkpoint of the same model, as a training run has many
    state = normconvert.apply_plan(other.state_dict(), report.plan)
    apply_module_edits(other, report.plan.modules)
    if method in ("rmsnorm", "crmsnorm"):  # the others untie a head
        other.load_state_dict(state)
    again, _ = normconvert.convert_model(gpt(seed=7), method, example_inputs=CALL, verify=None)
    assert all(torch.equal(state[name], value) for name, value in again.state_dict().items())


def test_a_fused_state_dict_lacks_the_norms_and_has_new_tensors() -> None:
    model, example = lightning()
    perturb(model)
    converted, report = normconvert.convert_model(model, "fuse-bn", example_inputs=example, verify=None)
    found = normconvert.apply_plan(model.state_dict(), report.plan)
    assert {name: value.tolist() for name, value in found.items()} == {
        name: value.tolist() for name, value in converted.state_dict().items()
    }
    assert not any("running" in name for name in found)


def changed(state: State, **values: Any) -> State:
    return {**state, **{name.replace("__", "."): value for name, value in values.items()}}


WRONG: dict[str, tuple[Callable[[State], State], str]] = {
    "lacks one": (
        lambda s: {n: v for n, v in s.items() if n != "transformer.h.0.ln_1.weight"},
        "lacks the tensor 'transformer.h.0.ln_1.weight' of the plan's model, one of 1",
    ),
    "has more": (lambda s: changed(s, extra=torch.zeros(2)), "has the tensor 'extra', which the plan's model does not"),
    "deeper": (lambda s: gpt(2).state_dict(), r"has the tensor 'transformer.h.1.ln_1.weight', which the plan's model"),
    "another shape": (
        lambda s: changed(s, transformer__wpe__weight=torch.zeros(8, 32)),
        r"tensor 'transformer.wpe.weight' is \[8, 32\], and \[64, 32\] in the plan's model",
    ),
    "integers": (
        lambda s: changed(s, transformer__wpe__weight=s["transformer.wpe.weight"].int()),
        "edits the tensor 'transformer.wpe.weight', which is int32, not floating",
    ),
    "untied": (
        lambda s: changed(s, lm_head__weight=s["lm_head.weight"] + 1),
        "tensors transformer.wte.weight.* lm_head.weight.* differ here|are one in the plan's model, and differ here",
    ),
    "not finite": (
        lambda s: changed(s, transformer__wpe__weight=s["transformer.wpe.weight"] * torch.inf),
        "transformer.wpe.weight",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_state_dict_of_another_model_is_refused_in_one_line(case: str) -> None:
    change, message = WRONG[case]
    plan = normconvert.inspect(gpt(), example_inputs=CALL, tied="untie").plan
    with pytest.raises(InputError, match=message) as caught:
        normconvert.apply_plan(change(gpt().state_dict()), plan)
    assert "\n" not in str(caught.value)


def test_what_is_no_plan_or_says_too_little_is_refused(tmp_path: Path) -> None:
    state = gpt().state_dict()
    (tmp_path / "no.json").write_text("{}")
    for path, message in ((tmp_path / "no.json", "not a plan: plan format None"), (tmp_path / "none", "not a plan")):
        with pytest.raises(InputError, match=message):
            normconvert.apply_plan(state, path)
    plan = normconvert.inspect(gpt(), example_inputs=CALL).plan.to_json()
    (tmp_path / "old.json").write_text(json.dumps({k: v for k, v in plan.items() if k != "shapes"}))
    with pytest.raises(InputError, match="does not say which tensors its model has"):
        normconvert.apply_plan(state, tmp_path / "old.json")
