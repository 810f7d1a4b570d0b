"""What is left of a norm between two non-linearities: the clamp, in files and in every mode torch runs modules in."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import Tensor, nn

import normconvert
from normconvert.benchmark.bound import without_norms
from normconvert.cli import run
from normconvert.errors import InputError
from normconvert.runtime import Clip
from tests.support.fused_networks import Chain, fused, with_signs
from tests.support.perturb import perturb, settle

ARGS: dict[str, Any] = {"growth_rate": 8, "block_config": [2, 2], "num_classes": 7}


def vectors(clip: Clip, kinds: str = "+-=") -> Clip:
    """Channels of the kinds given, in turn: a positive scale, a negative one, a constant."""
    for at, kind in enumerate(kinds * 8):
        if at < clip.start.numel():
            clip.start.view(-1)[at] = 0.3 * at - 1.0
            clip.lower.view(-1)[at] = {"+": 0.0, "-": -torch.inf, "=": 0.5}[kind]
            clip.upper.view(-1)[at] = {"+": torch.inf, "-": 0.0, "=": 0.5}[kind]
    return clip


def definition(x: Tensor, clip: Clip) -> Tensor:
    return torch.clamp(x.double() - clip.start.double(), clip.lower.double(), clip.upper.double())


@pytest.fixture(scope="module")
def densenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip") / "densenet"
    torch.manual_seed(3)
    model = perturb(timm.create_model("densenet121", **ARGS).eval())
    settle(model, lambda: model(torch.randn(4, 3, 64, 64)))
    with_signs(model)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "norm" in name and name.endswith("bias"):
                value[4] = -1.0  # next to no scale: never on, and where it would begin is beyond float16
    save_for_hf(model, folder, model_args=ARGS, safe_serialization=True)
    return folder


def test_a_densenet_has_no_norm_left(densenet: Path, tmp_path: Path) -> None:
    report = normconvert.convert(densenet, tmp_path / "out", "fuse-bn", through_features=True)
    assert (report.converted, report.total) == (11, 11)
    assert sum(v.code == "clipped" for v in report.plan.verdicts) == 6
    assert report.fidelity is not None
    assert report.fidelity.algebra <= 1e-10
    model: Any = normconvert.load(tmp_path / "out")
    assert [type(m).__name__ for m in model.modules() if "Norm" in type(m).__name__] == []
    assert sum(isinstance(m, Clip) for m in model.modules()) == 6
    original = timm.create_model("densenet121", **ARGS).eval()
    original.load_state_dict(load_file(densenet / "model.safetensors"))
    x = torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        assert torch.allclose(model(x), original(x), rtol=1e-4, atol=1e-4)
    assert run(["fuse-bn", str(tmp_path / "out"), str(tmp_path / "again"), "-q"]) == 3


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_starts_fit_the_dtype_that_they_are_stored_in(densenet: Path, tmp_path: Path, dtype: str) -> None:
    normconvert.convert(densenet, tmp_path / "out", "fuse-bn", through_features=True, dtype=dtype, verify=False)
    state = load_file(tmp_path / "out" / "model.safetensors")
    starts = [value for name, value in state.items() if name.endswith(".start")]
    assert len(starts) == 6
    assert all(value.dtype is getattr(torch, dtype) and bool(value.isfinite().all()) for value in starts)


def test_a_start_that_does_not_fit_is_refused(densenet: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for file in densenet.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    state = load_file(source / "model.safetensors")
    name = "features.denseblock1.denselayer2.norm1"
    state[f"{name}.weight"][2], state[f"{name}.bias"][2] = 1e-7, 1.0  # always on: its scale cannot be taken for 0
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"norm1\.start overflows torch.float16: choose another --dtype"):
        normconvert.convert(source, tmp_path / "out", "fuse-bn", dtype="float16", verify=False)
    assert not (tmp_path / "out").exists()
    normconvert.convert(source, tmp_path / "out", "fuse-bn")


def test_the_norm_free_bound_keeps_the_activation(densenet: Path) -> None:
    plan = normconvert.inspect(densenet, "fuse-bn").plan
    model = timm.create_model("densenet121", **ARGS).eval()
    x = torch.randn(1, 3, 64, 64)
    bound = without_norms(model, [v.path for v in plan.converted], plan.modules, lambda m: m(x))
    assert sum(isinstance(m, nn.ReLU) for m in bound.modules()) == 11


@pytest.mark.parametrize("kinds", ["+", "-", "+-", "+-="])
def test_the_clamp_is_its_definition(kinds: str) -> None:
    clip, x = vectors(Clip((6, 1, 1)), kinds), 3 * torch.randn(2, 6, 5, 4)
    expected = definition(x, clip).float()
    before = x.clone()
    with torch.no_grad():
        assert torch.allclose(clip(x), expected, atol=1e-6)
    assert torch.equal(x, before), "the input is left as it was"
    assert torch.allclose(torch.compile(clip, backend="eager", fullgraph=True)(x), expected, atol=1e-6)
    exported = torch.export.export(clip, (x,)).module()
    assert torch.allclose(exported(x), expected, atol=1e-6)
    y = x.clone().requires_grad_()
    clip(y).sum().backward()
    assert y.grad is not None
    inside = (expected > clip.lower) & (expected < clip.upper)
    assert torch.equal(y.grad, inside.float())


def test_an_owned_input_is_written_over_and_no_other(densenet: Path, tmp_path: Path) -> None:
    """The bottlenecks' concatenations are theirs alone; what a dense block returns may be looked at by a hook."""
    plan = normconvert.inspect(densenet, "fuse-bn").plan
    owned = {edit["path"] for edit in plan.modules if edit["op"] == "clip" and edit["owned"]}
    assert owned == {f"features.denseblock{b}.denselayer{n}.norm1" for b in (1, 2) for n in (1, 2)}
    normconvert.convert(densenet, tmp_path / "out", "fuse-bn", verify=False)
    model: Any = normconvert.load(tmp_path / "out")
    seen: list[tuple[Tensor, Tensor]] = []
    for name, module in model.named_modules():
        if name.rpartition(".")[2].startswith(("dense", "transition", "features", "pool", "conv2")):
            module.register_forward_hook(lambda m, a, y: seen.append((y, y.clone())))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        result = model(x)
    assert len(seen) >= 12
    assert all(torch.equal(value, then) for value, then in seen), "no module's result changes after it is returned"
    assert torch.allclose(model(x), result, atol=1e-5), "with gradients, which overwrites nothing"
    clip, y = vectors(Clip((6, 1, 1), owned=True), "+"), torch.randn(2, 6, 5, 4)
    before = y.clone()
    clip(y)
    assert torch.equal(y, before)
    with torch.no_grad():
        assert clip(y).data_ptr() == y.data_ptr()


def test_bounds_are_looked_at_again_when_they_change() -> None:
    clip, x = vectors(Clip((6, 1, 1)), "+"), torch.randn(2, 6, 5, 4)
    assert torch.equal(clip(x), definition(x, clip).float()) or torch.allclose(clip(x), definition(x, clip).float())
    vectors(clip, "-")
    assert torch.allclose(clip(x), definition(x, clip).float(), atol=1e-6), "written in place"
    other = vectors(Clip((6, 1, 1)), "+-=")
    clip.load_state_dict(other.state_dict(), assign=True)
    assert torch.allclose(clip(x), definition(x, other).float(), atol=1e-6), "other tensors"
    assert torch.allclose(copy.deepcopy(clip).double()(x.double()), definition(x, other))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_keeps_the_dtype(dtype: torch.dtype) -> None:
    clip, x = vectors(Clip((6, 1, 1))), torch.randn(2, 6, 5, 4, dtype=dtype)
    assert clip(x).dtype is dtype
    assert torch.allclose(clip(x).double(), definition(x, clip), atol=2e-2)


def test_what_another_module_returns_is_not_owned() -> None:
    plan, _ = fused(
        lambda: Chain(nn.SiLU(), lambda x: torch.cat([x, 2 * x], 1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 4, 1))
    )
    assert [edit["owned"] for edit in plan.modules if edit["op"] == "clip"] == [False]
