"""Linear maps of an odd number of results, as crmsnorm makes them, compute one more: nobody else can tell."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from normconvert import convert, load
from normconvert.runtime import PADDED_FROM, Padded, apply_module_edits
from tests.support.tiny_checkpoints import gpt2, save, save_vit, vit

KINDS = {
    "linear": lambda: nn.Linear(12, 8),
    "no bias": lambda: nn.Linear(12, 8, bias=False),
    "conv1d": lambda: Conv1D(8, 12),
}


def resized(kind: str) -> Any:
    """A linear map from 12 to 7 numbers with random parameters."""
    model = nn.Sequential(KINDS[kind]())
    across = isinstance(model[0], Conv1D)
    rows = [{"op": "resize", "path": "0", "name": "weight", "shape": [12, 7] if across else [7, 12],
             "set": {"nf" if across else "out_features": 7}}]  # fmt: skip
    if kind != "no bias":
        rows.append({"op": "resize", "path": "0", "name": "bias", "shape": [7]})
    apply_module_edits(model, rows)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model[0]


def definition(module: Any, x: Tensor) -> Tensor:
    weight = module.weight.detach().double()
    y = x.double() @ (weight if isinstance(module, Conv1D) else weight.t())
    return y if module.bias is None else y + module.bias.detach().double()


def padded(y: Tensor) -> bool:
    """Whether a result was computed with one number more."""
    return y.stride(-2) == y.shape[-1] + 1


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, max(PADDED_FROM), 12)


@pytest.mark.parametrize("kind", KINDS)
def test_the_results_are_the_same_and_padded(kind: str, x: Tensor) -> None:
    module = resized(kind)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    with torch.inference_mode():
        for _ in range(2):
            y = module(x)
            assert padded(y)
            assert torch.allclose(y.double(), definition(module, x), atol=1e-5)
        assert not padded(module(x[:1, :3])), "a few rows are as fast without"
        assert padded(module(x[:1, :8])) == isinstance(module, Conv1D), "kept as (inputs, outputs), not so few"
    assert {n: p.shape for n, p in module.named_parameters()} == {n: v.shape for n, v in state.items()}
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert all(value.is_contiguous() for value in module.state_dict().values())
    assert isinstance(module, (nn.Linear, Conv1D))
    assert type(module).__name__ in ("Linear", "Conv1D")


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_made_in_inference_mode_stay_where_they_are(kind: str, x: Tensor) -> None:
    with torch.inference_mode():
        module = resized(kind)
        y = module(x)
    assert not padded(y)
    assert torch.allclose(y.double(), definition(module, x), atol=1e-5)


def test_memory_that_processes_share_stays_where_it_is(x: Tensor) -> None:
    module = resized("linear").share_memory()
    at = module.weight.data_ptr()
    with torch.no_grad():
        assert not padded(module(x))
    assert module.weight.data_ptr() == at


def test_parameters_do_not_move_under_somebody_who_looks(x: Tensor) -> None:
    class Looks(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert "__set__" not in str(func)
            return func(*args, **(kwargs or {}))

    module = resized("linear")
    at = module.weight.data_ptr()
    with torch.no_grad(), Looks():
        assert not padded(module(x))
    assert module.weight.data_ptr() == at


@pytest.mark.parametrize("kind", KINDS)
def test_changes_of_the_parameters_are_seen(kind: str, x: Tensor) -> None:
    module = resized(kind)
    with torch.no_grad():
        module(x)
        module.weight.mul_(2.0)
        assert torch.allclose(module(x).double(), definition(module, x), atol=1e-5), "in place"
        module.load_state_dict({n: torch.randn(v.shape) for n, v in module.state_dict().items()}, assign=True)
        assert torch.allclose(module(x).double(), definition(module, x), atol=1e-5), "other tensors"
        assert padded(module(x))
        for parameter in module.parameters():
            parameter.data = torch.randn(parameter.shape)
            assert torch.allclose(module(x).double(), definition(module, x), atol=1e-5), "other memory"
        assert padded(module(x))
        module.double()
        module.float()
    optimizer = torch.optim.SGD(module.parameters(), 0.1)  # after a call without gradients, training goes on
    y = module(x)
    assert not padded(y)
    y.sum().backward()
    optimizer.step()
    with torch.no_grad():
        assert torch.allclose(module(x).double(), definition(module, x), atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_pickles_and_casts(kind: str, x: Tensor) -> None:
    module = resized(kind)
    with torch.no_grad():
        module(x)
        memory = io.BytesIO()
        torch.save(module, memory)
        memory.seek(0)
        for other in (copy.deepcopy(module), torch.load(memory, weights_only=False), copy.deepcopy(module).double()):
            y = other(x.to(other.weight.dtype))
            assert isinstance(other, Padded)
            assert padded(y)
            assert torch.allclose(y.double(), definition(module, x), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_compilers_and_exporters_see_the_plain_map(kind: str, x: Tensor, tmp_path: Path) -> None:
    module = resized(kind).eval()
    with torch.no_grad():
        expected = module(x)
        assert torch.allclose(torch.compile(module, backend="eager", fullgraph=True)(x), expected, atol=1e-5)
        program = torch.export.export(module, (x,))
        assert torch.allclose(program.module()(x), expected, atol=1e-5)
        assert "as_strided" not in str(program.graph)
        assert torch.allclose(torch.jit.trace(module, x)(x), expected, atol=1e-5)
        assert torch.allclose(torch.func.vmap(module)(x), expected, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            assert module(x).dtype is torch.bfloat16
    save_file(module.state_dict(), tmp_path / "m.safetensors")
    assert load_file(tmp_path / "m.safetensors")["weight"].shape == module.weight.shape


def test_an_even_number_of_results_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(12, 9))
    apply_module_edits(
        model,
        [{"op": "resize", "path": "0", "name": "weight", "shape": [8, 12], "set": {"out_features": 8}},
         {"op": "resize", "path": "0", "name": "bias", "shape": [8]}],
    )  # fmt: skip
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize(("make", "keep", "count"), [(gpt2, save, 4), (vit, save_vit, 4)])
def test_the_writers_of_a_compressed_stream_are_padded(make: Any, keep: Any, count: int, tmp_path: Path) -> None:
    convert(keep(make(), tmp_path / "src"), tmp_path / "out", "crmsnorm")
    model: Any = load(tmp_path / "out")
    writers = [n for n, m in model.named_modules() if isinstance(m, Padded)]
    assert len(writers) == count, writers
    x = torch.randint(0, 50, (4, 24)) if make is gpt2 else torch.randn(16, 3, *([model.patch_embed.img_size[0]] * 2))
    outputs: list[Tensor] = []
    for name in writers:
        model.get_submodule(name).register_forward_hook(lambda m, a, y: outputs.append(y))
    with torch.inference_mode():
        model(x)
    assert any(padded(y) for y in outputs)
