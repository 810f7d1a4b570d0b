"""Rotations are orthogonal, keep what they should keep, and are made of a seed alone."""

from __future__ import annotations

import math

import pytest
import torch

from normconvert.options import ROTATIONS
from normconvert.plan import rotations
from normconvert.plan.edits import apply_edits
from normconvert.plan.rotations import order_without_hadamard, rotated

WIDTHS = [1, 2, 3, 7, 8, 12, 20, 28, 30, 36, 96, 100, 192, 576]


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("kind", ROTATIONS)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_rotation_is_orthogonal(width: int, kind: str, constant: bool) -> None:
    one = torch.eye(width, dtype=torch.float64)
    matrix = rotated(one.clone(), 0, kind, 3, constant)
    torch.testing.assert_close(matrix.T @ matrix, one, rtol=0, atol=1e-12)
    if constant:
        ones = torch.ones(width, dtype=torch.float64)
        torch.testing.assert_close(rotated(ones.clone(), 0, kind, 3, True), ones, rtol=0, atol=1e-12)
    x = torch.randn(2, width, 3, dtype=torch.float64)
    torch.testing.assert_close(rotated(x.clone(), 1, kind, 3, constant), torch.einsum("ij,ajb->aib", matrix, x))


@pytest.mark.parametrize("width", [576, 768, 896, 1152, 1536, 2304, 2560, 3584, 5120])
def test_widths_in_use_have_a_hadamard_matrix(width: int) -> None:
    assert order_without_hadamard(width) == 1
    column = rotated(torch.eye(width, 1, dtype=torch.float64), 0, "hadamard", 0, False)
    torch.testing.assert_close(column.abs() * width**0.5, torch.ones(width, 1, dtype=torch.float64))


def test_a_hadamard_matrix_that_keeps_the_mean_spreads_as_well() -> None:
    width = 768
    sizes = rotated(torch.eye(width, dtype=torch.float64), 0, "hadamard", 0, True).abs() * width**0.5
    assert sizes[:, 1:].max() < 1.25  # of a random matrix: about 5
    assert sizes[:, 0].max() < 5


@pytest.mark.parametrize("kind", ROTATIONS)
@pytest.mark.parametrize("width", [96, 100])
def test_rows_of_channels_are_rotated_in_slices(width: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotations, "SLICE", 7 * width)
    matrix = rotated(torch.eye(width, dtype=torch.float64), 0, kind, 3, True)
    rows = torch.randn(3, 75, width, dtype=torch.float64)
    expected = rows @ matrix.T
    torch.testing.assert_close(rotated(rows.clone(), 2, kind, 3, True), expected)
    # As a view in a larger tensor, whose other numbers stay.
    wide = torch.zeros(3, 75, 2 * width, dtype=torch.float64)
    wide[..., :width] = rows
    torch.testing.assert_close(rotated(wide[..., :width], 2, kind, 3, True), expected)
    assert not wide[..., width:].any()


@pytest.mark.parametrize("kind", ROTATIONS)
@pytest.mark.parametrize("behind", [(75,), (2,), (5, 4)])
@pytest.mark.parametrize("before", [(), (9,)])
def test_channels_before_others_are_rotated_in_slices(
    before: tuple[int, ...], behind: tuple[int, ...], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    width = 48
    monkeypatch.setattr(rotations, "SLICE", 7 * width)
    matrix = rotated(torch.eye(width, dtype=torch.float64), 0, kind, 3, True)
    x = torch.randn(*before, width, *behind, dtype=torch.float64)
    expected = torch.einsum("ij,bjk->bik", matrix, x.reshape(-1, width, math.prod(behind))).reshape(x.shape)
    torch.testing.assert_close(rotated(x, len(before), kind, 3, True), expected)


def test_a_width_without_one_takes_the_smallest_random_factor() -> None:
    assert order_without_hadamard(4 * 23) == 23


def test_seeds_make_other_rotations() -> None:
    one = torch.eye(24, dtype=torch.float64)
    for kind in ROTATIONS:
        first, other, again = (rotated(one.clone(), 0, kind, seed, True) for seed in (0, 1, 0))
        assert not torch.allclose(first, other)
        assert torch.equal(first, again)
    with pytest.raises(KeyError):
        rotated(one, 0, "identity", 0, False)


def test_the_channels_may_be_a_factor_of_a_dimension() -> None:
    x = torch.randn(3, 2 * 8 * 5, dtype=torch.float64)
    row = {"op": "rotate", "kind": "hadamard", "seed": 1, "constant": False, "axis": 1, "outer": 2, "inner": 5}
    expected = rotated(x.reshape(3, 2, 8, 5).clone(), 2, "hadamard", 1, False).reshape(x.shape)
    torch.testing.assert_close(apply_edits(x, [row], lambda name: x), expected, rtol=0, atol=0)
