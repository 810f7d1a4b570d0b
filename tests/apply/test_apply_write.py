"""The writer's threads and the reader beside them: they cannot be seen in the result, and they end with the work."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from normconvert import convert
from normconvert.apply import blocks as apply_blocks
from normconvert.apply import scan as scanning
from normconvert.apply import writer as apply_write
from normconvert.errors import InputError, NothingToConvert
from normconvert.plan.conversion_plan import Plan
from normconvert.sources import open_source
from tests.apply.test_apply import PLAN
from tests.support.applied_plans import apply_plan
from tests.support.tiny_checkpoints import contents, gpt2, save

CENTER = Plan("x", tensors={"transformer.wpe.weight": [{"op": "center", "axis": 1}]})
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def reading() -> bool:
    return any(thread.name == "normconvert-reader" for thread in threading.enumerate())


@pytest.mark.parametrize("form", ["safetensors", "sharded", "bin"])
def test_the_number_of_threads_does_not_show(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(str(save(gpt2(n_layer=4), tmp_path / "src", form)))
    monkeypatch.setattr(apply_blocks, "BLOCK", 97)
    monkeypatch.setattr(apply_write, "PIECE", 97)
    for workers in (1, 2, 5):
        monkeypatch.setattr(apply_write, "WORKERS", workers)
        monkeypatch.setattr("os.cpu_count", lambda: 8)
        apply_plan(source, PLAN, tmp_path / f"out{workers}")
    assert contents(tmp_path / "out1") == contents(tmp_path / "out2") == contents(tmp_path / "out5")


def test_every_thread_stops_when_one_fails(tmp_path: Path) -> None:
    before = threading.active_count()  # other tests leave threads of torch's
    model = gpt2(n_layer=4)
    model.get_parameter("transformer.wpe.weight").data[3, 3] = 3e38  # centring it overflows nothing in float64
    source = open_source(str(save(model, tmp_path / "src")))
    with pytest.raises(InputError, match=r"transformer\.wpe\.weight .*overflows"):
        apply_plan(source, CENTER, tmp_path / "out", dtype=torch.float16)
    assert not reading()
    assert threading.active_count() == before
    assert not (tmp_path / "out").exists()


def test_an_error_of_the_progress_stops_the_threads(tmp_path: Path) -> None:
    before = threading.active_count()
    source = open_source(str(save(gpt2(), tmp_path / "src")))

    def progress(name: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        apply_plan(source, CENTER, tmp_path / "out", progress=progress)
    assert threading.active_count() == before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", ["nan", "-nan", "inf", "-inf"])
def test_a_copied_weight_that_is_not_finite_is_found(tmp_path: Path, dtype: torch.dtype, value: str) -> None:
    model = gpt2(n_layer=1).to(dtype)
    model.get_parameter("transformer.h.0.mlp.c_fc.weight").data[-1, -1] = (
        -torch.tensor(float("nan")) if value == "-nan" else float(value)
    )
    source = open_source(str(save(model, tmp_path / "src")))
    with pytest.raises(InputError, match=r"h\.0\.mlp\.c_fc\.weight holds a value that is NaN or infinite"):
        apply_plan(source, CENTER, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chunk", [scanning.CHUNK, 24])
def test_the_largest_numbers_are_finite(
    tmp_path: Path, dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scanning, "CHUNK", chunk)
    model = gpt2(n_layer=1).to(dtype)
    weight, largest = model.get_parameter("transformer.h.0.mlp.c_fc.weight").data, torch.finfo(dtype).max
    weight[:] = largest
    weight[0] = -largest
    source = open_source(str(save(model, tmp_path / "src")))
    apply_plan(source, CENTER, tmp_path / "out")
    assert torch.equal(open_source(str(tmp_path / "out")).read("transformer.h.0.mlp.c_fc.weight"), weight)


def test_a_buffer_may_be_infinite(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save(gpt2(), tmp_path / "src")
    state = load_file(folder / "model.safetensors")
    save_file({**state, "stray": torch.full((3,), -torch.inf)}, folder / "model.safetensors", metadata={"format": "pt"})
    apply_plan(open_source(str(folder)), CENTER, tmp_path / "out")
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["stray"], torch.full((3,), -torch.inf))


def test_reading_ends_with_a_conversion_that_is_refused(tmp_path: Path) -> None:
    import timm
    from timm.models import save_for_hf

    save_for_hf(timm.create_model("resnet18"), tmp_path / "src", safe_serialization=True)
    with pytest.raises(NothingToConvert):
        convert(tmp_path / "src", tmp_path / "out", verify=False)
    assert not reading()
