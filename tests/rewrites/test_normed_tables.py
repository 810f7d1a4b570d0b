"""A norm behind a table writes into a rotated stream: the table takes what the norm made of its rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import normconvert
from normconvert.apply.underflow import Underflow
from normconvert.errors import InputError
from normconvert.options import Options
from normconvert.plan.edits import apply_edits
from tests.support.basis import check_basis
from tests.support.basis_models import built, logits

IDS = torch.arange(6).reshape(2, 3)


class Behind(nn.Module):
    """A norm of rows of a table writes into the stream."""

    def __init__(
        self, first: Callable[..., nn.Module] = nn.LayerNorm, last: Callable[..., nn.Module] = nn.LayerNorm
    ) -> None:
        super().__init__()
        self.table, self.first = nn.Embedding(11, 8), first(8, eps=1e-3)
        self.inner, self.middle, self.write = nn.Linear(8, 5), last(8, eps=1e-5), nn.Linear(5, 8)
        self.last, self.head = last(8, eps=1e-5), nn.Linear(8, 11, bias=False)

    def rows(self, ids: Tensor) -> Tensor:
        rows: Tensor = self.table(ids)
        return rows

    def forward(self, ids: Tensor) -> Tensor:
        x = self.first(self.rows(ids))
        x = x + self.write(torch.relu(self.inner(self.middle(x))))
        logits: Tensor = self.head(self.last(x))
        return logits


class Tied(Behind):
    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.table.weight


class Scaled(Behind):
    """The rows are multiplied by a number on their way."""

    def rows(self, ids: Tensor) -> Tensor:
        return super().rows(ids) * 2.0


class Joined(Behind):
    """The norm reads rows of two tables."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Embedding(3, 8)

    def rows(self, ids: Tensor) -> Tensor:
        return super().rows(ids) + self.places.weight


class Direct(Behind):
    """A linear map reads the stream past its norms: it sees the mean, which the norm of rows loses."""

    def __init__(self, *norms: Callable[..., nn.Module]) -> None:
        super().__init__(*norms)
        self.direct, self.back = nn.Linear(8, 5), nn.Linear(5, 8)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.first(self.rows(ids))
        x = x + self.back(torch.relu(self.direct(x)))
        x = x + self.write(torch.relu(self.inner(self.middle(x))))
        logits: Tensor = self.head(self.last(x))
        return logits


class Seen(Behind):
    """Something else reads the table."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) + self.table(ids).square().mean(-1, keepdim=True)


def roots(size: int, eps: float) -> nn.Module:
    return nn.RMSNorm(size, eps=eps)


@pytest.mark.parametrize("make", [
    Behind, Tied, lambda: Behind(roots, roots), lambda: Behind(roots, nn.LayerNorm), lambda: Direct(roots, roots),
])  # fmt: skip
@pytest.mark.parametrize("rotation", ["hadamard", "random"])
def test_the_table_takes_what_the_norm_made_of_its_rows(make: Callable[[], nn.Module], rotation: str) -> None:
    outcome = check_basis(make, [{"ids": IDS}], "rotate", Options(rotation=rotation))
    assert outcome.plan is not None
    assert not outcome.plan.kept
    # Its weight is one number, which is not one.
    assert not outcome.problems
    assert [row["op"] for row in outcome.plan.tensors["table.weight"]] == ["normed", "rotate"]


@pytest.mark.parametrize("make", [Scaled, Joined, Seen, Direct, lambda: Behind(nn.LayerNorm, roots)])
def test_what_is_no_row_of_one_table_keeps_the_stream(make: Callable[[], nn.Module]) -> None:
    outcome = check_basis(make, [{"ids": IDS}], "rotate", Options())
    assert outcome.plan is not None
    assert not outcome.plan.converted
    assert not outcome.problems


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("eps", [1e-12, 1e-5, 0.3])
def test_the_norm_gives_the_vectors_that_it_gave(eps: float, offset: float) -> None:
    """Rows of zeros, of one number and of large ones, and a gain with a zero and signs."""
    rows = torch.randn(9, 8, dtype=torch.float64)
    rows[0], rows[1], rows[2] = 0.0, 3.0, 1e4 * rows[2]
    gain = torch.randn(8, dtype=torch.float64)
    gain[3] = -offset
    stored = {"w": gain}
    by = ["add", "w", offset] if offset else "w"
    for centred, norm in ((True, torch.nn.functional.layer_norm), (False, torch.nn.functional.rms_norm)):
        row = {"op": "normed", "by": by, "eps": eps, "centred": centred, "axis": 1}
        found = apply_edits(rows, [row], stored.__getitem__)
        number = apply_edits(gain, [{"op": "bound", "by": ["power_above", by]}], stored.__getitem__)
        expected = norm(rows, (8,), gain + offset, eps=eps)
        expected = expected - expected.mean(-1, keepdim=True) if centred else expected
        torch.testing.assert_close(norm(found, (8,), number, eps=eps), expected, rtol=1e-12, atol=1e-12)
        assert len(set(number.tolist())) == 1


def test_a_gain_of_zeros_gives_zeros() -> None:
    rows, stored = torch.randn(3, 8), {"w": torch.zeros(8)}
    found = apply_edits(
        rows, [{"op": "normed", "by": "w", "eps": 1e-5, "centred": True, "axis": 1}], stored.__getitem__
    )
    assert torch.equal(found, torch.zeros_like(found))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_bloom_is_rotated_in_its_own_class(tmp_path: Path, dtype: torch.dtype) -> None:
    built("bloom").to(dtype).save_pretrained(tmp_path / "model")  # type: ignore[operator]
    report = normconvert.convert(tmp_path / "model", tmp_path / "out", "rotate", verify_level="quick")
    assert report.fidelity is not None
    assert report.fidelity.passed
    assert not report.plan.kept
    before, after = (AutoModelForCausalLM.from_pretrained(tmp_path / n, dtype=torch.float64) for n in ("model", "out"))
    expected, found = logits(before), logits(after)
    assert float((found - expected).norm() / expected.norm()) < 32 * torch.finfo(dtype).eps
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        embeddings = after.get_input_embeddings()(ids)
        torch.testing.assert_close(after(inputs_embeds=embeddings).logits, after(ids).logits)


def test_rows_that_a_half_cannot_hold_are_refused_by_name() -> None:
    """As where one channel's gain is much larger than all others'."""
    lost = Underflow("table.weight", [{"op": "normed"}])
    exact = torch.full((4, 4), 1.1e-7, dtype=torch.float64)
    lost.see(exact, exact.half())
    with pytest.raises(InputError, match=r"tensor table\.weight: rows for which the norm behind it .* wider --dtype"):
        lost.check(torch.float16)
