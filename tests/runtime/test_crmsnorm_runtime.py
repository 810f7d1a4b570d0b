"""The norm of a stream in one channel less, the operation that compresses, and the two bases."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from normconvert import runtime
from normconvert.plan.edits import apply_edits
from normconvert.runtime import BASES, CRMSNorm, apply_module_edits, compress, lift
from tests.support.equivalence import computed, distance

D = 48
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
OPTIONS: dict[str, dict[str, Any]] = {
    "folded": {},
    "expand": {"expand": True},
    "expand, weight": {"expand": True, "weight": True},
    "expand, weight and bias": {"expand": True, "weight": True, "bias": True},
}


def norm(dtype: torch.dtype, basis: str, options: dict[str, Any], axis: int = -1) -> CRMSNorm:
    given: dict[str, Any] = dict(options)
    given |= {k: nn.Parameter(torch.randn(D)) for k in ("weight", "bias") if k in options}
    return CRMSNorm(D, 1e-3, basis=basis, axis=axis, **given).to(dtype).eval()


def definition(x: Tensor, module: CRMSNorm) -> Tensor:
    """LayerNorm of the value that ``x`` stands for, in float64; of a folded norm compressed again."""
    full = lift(x.double(), module.axis, module.basis).movedim(module.axis, -1)
    weight, bias = (v.double() if (v := module._parameters[k]) is not None else None for k in ("weight", "bias"))
    y = F.layer_norm(full, (D,), weight, bias, module.eps).movedim(-1, module.axis)
    return y if module.expand else compress(y, module.axis, module.basis)


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("shape", "axis"), [((2, 5, D - 1), -1), ((2, D - 1, 3, 4), -3)])
@pytest.mark.parametrize(
    ("dtype", "mode"),
    [(torch.float32, mode) for mode in ("eager", "autograd", "compiled", "exported")]
    + [(dtype, "eager") for dtype in (torch.float64, torch.bfloat16, torch.float16)],
)
def test_it_is_layer_norm_of_what_is_stored(
    dtype: torch.dtype, shape: tuple[int, ...], axis: int, options: str, basis: str, mode: str
) -> None:
    module = norm(dtype, basis, OPTIONS[options], axis)
    x = torch.randn(shape).to(dtype)
    truth = definition(x, module)
    y = computed(module, x, mode)
    assert y.dtype == dtype
    assert y.shape == truth.shape
    assert distance(y, truth) < TOLERANCE[dtype] * (2 if basis == "paper" else 1)


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_are_those_of_the_definition(basis: str, options: str) -> None:
    module = norm(torch.float64, basis, OPTIONS[options])
    module.train()
    x = torch.randn(3, D - 1, dtype=torch.float64, requires_grad=True)
    gradients = [torch.autograd.grad(f(x).sin().sum(), x)[0] for f in (module, lambda x: definition(x, module))]
    torch.testing.assert_close(*gradients)


@given(size=st.integers(2, 300), basis=st.sampled_from(sorted(BASES)), seed=st.integers(0, 9))
def test_compressing_loses_the_mean_and_nothing_else(size: int, basis: str, seed: int) -> None:
    x = torch.randn(3, size, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + seed
    small = compress(x, 1, basis)
    assert small.shape == (3, size - 1, 2)
    centred = x - x.mean(1, keepdim=True)
    torch.testing.assert_close(lift(small, 1, basis), centred)
    if basis == "isometric":
        torch.testing.assert_close(small.square().mean(1), centred.square().mean(1))


@pytest.mark.parametrize("basis", BASES)
def test_the_edits_are_the_runtime_s_maps(basis: str) -> None:
    """W (L y) = (W L) y for a reader W, and B (W x) = (B W) x for a writer; also where channels are one factor."""
    y, x = torch.randn(D - 1, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    reader, writer = torch.randn(7, 3 * D * 2, dtype=torch.float64), torch.randn(3 * D * 2, 5, dtype=torch.float64)
    factors = {"outer": 3, "inner": 2, "basis": basis}
    read = apply_edits(reader, [{"op": "read_compressed", "axis": 1, **factors}], _none)
    written = apply_edits(writer, [{"op": "compress", "axis": 0, **factors}], _none)
    repeated = y[None, :, None].expand(3, D - 1, 2)
    torch.testing.assert_close(read @ repeated.reshape(-1), reader @ lift(repeated, 1, basis).reshape(-1))
    expected = compress((writer @ x).reshape(3, D, 2), 1, basis)
    torch.testing.assert_close((written @ x).reshape(3, D - 1, 2), expected)


def _none(name: str) -> Tensor:
    raise KeyError(name)


def test_sixteen_bit_sums_are_accumulated_in_float32() -> None:
    x = torch.full((1, 4095), 300.0, dtype=torch.float16)  # the sum of squares overflows float16
    for basis in BASES:
        y = CRMSNorm(4096, basis=basis)(x)
        assert bool(torch.isfinite(y).all())
        assert distance(y, CRMSNorm(4096, basis=basis)(x.double())) < 1e-3


def test_it_prints_copies_and_pickles() -> None:
    module = CRMSNorm(D, basis="paper", expand=True)
    assert str(module).startswith("CRMSNorm(48, ")
    assert "basis=paper, expand=True" in str(module)
    assert str(CRMSNorm(D)).startswith("CRMSNorm(47, ")
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(module), torch.load(buffer, weights_only=False)):
        assert str(other) == str(module)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear, self.width = nn.LayerNorm(D), nn.Linear(D, D, bias=False), D

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(self.norm(x))
        return y


EDITS: list[dict[str, Any]] = [
    {"op": "compress", "path": "", "side": "input", "key": "0", "axis": -1, "basis": "isometric"},
    {"op": "resize", "path": "linear", "name": "weight", "shape": [D - 1, D - 1],
     "set": {"in_features": D - 1, "out_features": D - 1}},
    {"op": "bias", "path": "linear", "name": "bias", "size": D - 1},
    {"op": "set", "path": "", "set": {"width": D - 1}},
    {"op": "replace", "path": "norm", "kind": "crmsnorm", "size": D, "eps": 1e-5, "axis": -1, "weight": None,
     "bias": None, "dropped": ["weight", "bias"], "basis": "isometric", "expand": False},
]  # fmt: skip


def test_a_compressed_model_runs_compiles_and_exports() -> None:
    model = Block().eval()
    apply_module_edits(model, EDITS)
    assert set(model.state_dict()) == {"linear.weight", "linear.bias"}
    assert (model.linear.in_features, model.width) == (47, 47)
    x = torch.randn(2, 3, D)
    with torch.no_grad():
        y = model(x)
        assert y.shape == (2, 3, 47)
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), y)
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), y)
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("number", "change", "message"),
    [
        (4, {"dropped": ["weight"]}, r"holds \['bias', 'weight'\], expected \['weight'\]"),
        (4, {"basis": "another"}, "unknown basis 'another'; this file is older"),
        (3, {"set": {"depth": 3}}, "has no 'depth'"),
        (1, {"name": "gain"}, "has no parameter 'gain'"),
    ],
)
def test_an_edit_that_does_not_fit_is_refused(number: int, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        apply_module_edits(Block(), [{**EDITS[number], **change}])


def test_the_runtime_names_what_it_can_do() -> None:
    assert {"set", "compress"} <= set(runtime.MODULE_EDITS)
    assert "crmsnorm" in runtime.NORMS
