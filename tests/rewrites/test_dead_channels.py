"""Channels in which a norm has no weight: its bias stays where its readers have none, and is divided by the weight."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import normconvert
from normconvert.errors import InputError
from tests.support.basis_models import built, logits


@pytest.mark.slow
def test_a_bias_is_not_divided_by_zero(tmp_path: Path) -> None:
    model, source = built("gpt2"), tmp_path / "model"
    with torch.no_grad():
        model.get_submodule("transformer.ln_f").weight[3] = 0.0  # type: ignore[operator]
    model.save_pretrained(source)  # type: ignore[operator]
    for method in ("fold", "rotate"):
        with pytest.raises(InputError, match=r"transformer.ln_f.weight is zero in 1 of 48 channels"):
            normconvert.convert(source, tmp_path / "out", method)
    report = normconvert.convert(source, tmp_path / "out", "fold", keep="transformer.ln_f", verify_level="quick")
    assert [v.path for v in report.plan.kept] == ["transformer.ln_f"]


@pytest.mark.parametrize("method", ["fold", "rotate"])
def test_a_channel_without_weight_and_bias_stays_nothing(method: str) -> None:
    model = built("gpt2").double()
    last = model.get_submodule("transformer.ln_f")
    with torch.no_grad():
        last.weight[3] = last.bias[3] = 0.0  # type: ignore[operator]
    result, report = normconvert.convert_model(model, method, verify=False)
    assert "transformer.ln_f" in [v.path for v in report.plan.converted]
    torch.testing.assert_close(logits(result), logits(model), rtol=0, atol=1e-12)
    state = model.state_dict()
    state["transformer.ln_f.bias"][3] = 0.5
    with pytest.raises(InputError, match=r"'transformer.ln_f.bias': 1 numbers of it are to be divided by zeros"):
        normconvert.apply_plan(state, report.plan)
