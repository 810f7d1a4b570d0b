"""`--allow-unread`: tensors that no traced call reads are taken for unused, which the user answers for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import Tensor, nn

import normconvert
from normconvert.cli import run
from normconvert.options import Options
from normconvert.plan.conversion_plan import Plan
from normconvert.rewrites.planning import plan_graph
from normconvert.tracing.graph import trace
from tests.support.perturb import perturb

METHODS = ["rmsnorm", "crmsnorm", "rotate", "scale"]
OFFER = "; --allow-unread takes it for unused."
D = 12


class Marking(nn.Module):
    """Writes a mark into the stream if it is told to; ``plain``: what reads the stream past its norms."""

    def __init__(self, plain: bool = False) -> None:
        super().__init__()
        self.embed, self.mark = nn.Embedding(11, D), nn.Parameter(torch.randn(D))
        self.first, self.inner, self.last, self.head = (
            nn.LayerNorm(D),
            nn.Linear(D, D),
            nn.LayerNorm(D),
            nn.Linear(D, 3),
        )
        self.plain = plain

    def forward(self, ids: Tensor, marked: bool = False) -> Tensor:
        x = self.embed(ids)
        if marked:
            x = x + self.mark
        x = x + self.inner(self.first(x))
        found: Tensor = self.head(self.last(x))
        return found + torch.relu(x)[..., :3] if self.plain else found


def planned(method: str, plain: bool = False, **options: Any) -> Plan:
    with torch.device("meta"):
        model, ids = Marking(plain).eval(), torch.zeros(2, 5, dtype=torch.int64)
    return plan_graph(trace(model, {"ids": ids}), Options(power="1", **options), method)


@pytest.mark.parametrize("method", METHODS)
def test_the_option_is_offered_to_those_whom_it_helps_and_says_what_it_takes_for_granted(method: str) -> None:
    plan = planned(method)
    assert not plan.converted
    assert all("`mark` fits this stream" in v.reason and v.reason.endswith(OFFER) for v in plan.kept)
    assert {v.code for v in plan.kept} == {"unread"}
    allowed = planned(method, allow_unread=True)
    assert [v.path for v in allowed.converted] == ["first", "last"]
    assert "mark" not in allowed.tensors
    said = "right as long as nothing uses `mark`, which no traced call reads (--allow-unread)"
    assert said in allowed.notes


@pytest.mark.parametrize("method", METHODS)
def test_where_something_else_keeps_the_stream_that_is_the_reason(method: str) -> None:
    plan = planned(method, plain=True)
    assert not plan.converted
    assert not any("mark" in v.reason or "--allow" in v.reason for v in plan.kept)
    assert {v.code for v in plan.kept} == {"unknown-op"}


@pytest.mark.parametrize("method", ["rmsnorm", "rotate"])
def test_a_depth_model_whose_first_fusion_has_a_residual_that_it_never_gets(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backbone = hf.Dinov2Config(
        image_size=28, patch_size=14, hidden_size=32, num_hidden_layers=4, num_attention_heads=2,
        out_features=[f"stage{n}" for n in range(1, 5)], reshape_hidden_states=False,
    )  # fmt: skip
    sizes = {"reassemble_hidden_size": 32, "patch_size": 14, "neck_hidden_sizes": [4, 8, 8, 8]}
    config = hf.DepthAnythingConfig(backbone_config=backbone, **sizes, fusion_hidden_size=32, head_hidden_size=4)
    torch.manual_seed(0)
    model: Any = perturb(hf.DepthAnythingForDepthEstimation(config).eval())
    nn.init.ones_(model.head.conv3.bias)  # behind it is a ReLU, which would leave nothing to compare
    model.save_pretrained(tmp_path / "model")
    line = [method, str(tmp_path / "model"), str(tmp_path / "out")]
    assert run(line) == 3
    assert "--allow-unread" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run([*line, "--allow-unread"]) == 0
    # A line of the terminal breaks where it likes.
    assert "right as long as nothing uses `neck.fusion_stage" in " ".join(capsys.readouterr().out.split())
    assert normconvert.check(tmp_path / "out", tmp_path / "model").passed
    record = json.loads((tmp_path / "out" / "normconvert.json").read_text())
    assert record["options"]["allow_unread"] is True
    name = "backbone.embeddings.patch_embeddings.projection.weight"
    assert not torch.allclose(load_file(tmp_path / "out/model.safetensors")[name], model.state_dict()[name], atol=1e-3)
    pixels = torch.linspace(-1, 1, 3 * 28 * 42, dtype=torch.float64).sin().reshape(1, 3, 28, 42)
    with torch.no_grad():
        expected = model.double()(pixels).predicted_depth
        found = normconvert.load(tmp_path / "out", dtype=torch.float64)(pixels).predicted_depth
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, torch.zeros_like(found))
