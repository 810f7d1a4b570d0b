"""Linear maps that read a rotated stream past its norms take the inverse of its rotation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from normconvert.options import Options
from normconvert.rewrites.planning import plan_graph
from normconvert.rewrites.registry import REWRITES
from normconvert.tracing.graph import trace
from tests.support.basis import check_basis
from tests.support.equivalence import Outcome

D = 16
X = torch.linspace(-1, 1, 2 * 7 * 5, dtype=torch.float64).sin().reshape(2, 7, 5)


class Tower(nn.Module):
    """A projector reads what a layer gives, as in models that see."""

    def __init__(self) -> None:
        super().__init__()
        self.write, self.norm, self.inner = nn.Linear(5, D), nn.LayerNorm(D), nn.Linear(D, D)
        self.project, self.head = nn.Linear(D, 6), nn.Linear(6, 3)

    def tokens(self, x: Tensor) -> Tensor:
        x = self.write(x)
        tokens: Tensor = x + self.inner(self.norm(x))
        return tokens

    def read(self, tokens: Tensor) -> Tensor:
        read: Tensor = self.project(tokens)
        return read

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(torch.relu(self.read(self.tokens(x))))
        return found


class Roots(Tower):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(D, eps=1e-5)  # type: ignore[assignment]


class Convolved(Tower):
    """The projector is a convolution, which pads with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Conv1d(D, 6, 3, padding=1)  # type: ignore[assignment]

    def read(self, tokens: Tensor) -> Tensor:
        return super().read(tokens.transpose(1, 2)).transpose(1, 2)


class Mixed(Tower):
    """A map reads the stream and writes into it."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(D, D)

    def read(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.mix(tokens)
        return super().read(tokens + self.inner(self.norm(tokens)))


class Attended(Tower):
    """Queries, keys and values in one tensor read it."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(D, 4, batch_first=True)

    def read(self, tokens: Tensor) -> Tensor:
        return super().read(tokens + self.attend(tokens[:, :3], tokens, tokens, need_weights=False)[0].mean(1, True))


class Twice(Tower):
    """The projector reads something else, too."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Parameter(torch.empty(3, D))

    def read(self, tokens: Tensor) -> Tensor:
        return super().read(tokens) + super().read(self.other.square()).mean(0)


class Turned(Tower):
    """One matrix reads the stream along both of its dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.head = nn.Linear(D, D), nn.Linear(D, 3)

    def read(self, tokens: Tensor) -> Tensor:
        return super().read(tokens).relu() + tokens @ self.project.weight


class Written(Tower):
    """What reads the stream writes into it as well, by the same numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.head = nn.Linear(D, 3, bias=False), nn.Linear(3, 3)
        self.write = nn.Linear(3, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x[..., :3] @ self.project.weight + self.write(x[..., 2:])
        found: Tensor = self.head(torch.relu(self.read(tokens + self.inner(self.norm(tokens)))))
        return found


class Rows(nn.Module):
    """A norm of a table's rows writes into the stream, and a projector reads the rows as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.first, self.last = nn.Embedding(11, D), nn.LayerNorm(D), nn.LayerNorm(D)
        self.project, self.inner, self.head = nn.Linear(D, 3), nn.Linear(D, D), nn.Linear(D, 3)

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.table(ids)
        x = self.first(rows)
        found: Tensor = self.head(self.last(x + self.inner(x))) + self.project(rows)
        return found


def outcome_of(kind: type[nn.Module]) -> Outcome:
    ids = torch.arange(6).reshape(2, 3)
    inputs = [{"ids": ids}] if kind is Rows else [{"x": X}, {"x": X.flip(1)}]
    found = check_basis(kind, inputs, "rotate", Options())
    assert found.plan is not None
    assert not found.problems
    return found


@pytest.mark.parametrize("kind", [Tower, Roots, Convolved, Mixed, Attended])
def test_the_map_takes_the_inverse(kind: type[nn.Module]) -> None:
    found = outcome_of(kind)
    assert found.plan is not None
    assert not found.plan.kept


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Twice, "`project` reads it directly, and `project` reads `project.weight`, too."),
        (Turned, "`project` reads it directly, and matmul reads `project.weight`, too."),
        (Written, "`project` reads it directly, and matmul reads `project.weight`, too."),
        (Rows, "takes a number but no rotation (post-norm)"),
    ],
)
def test_a_map_that_cannot_keeps_the_stream_as_it_is(kind: type[nn.Module], reason: str) -> None:
    found = outcome_of(kind)
    assert found.plan is not None
    assert any(reason in verdict.reason for verdict in found.plan.kept)


class Encoder(Tower):
    """All that is returned is in the stream."""

    def __init__(self) -> None:
        super().__init__()
        del self.project, self.head

    def forward(self, x: Tensor) -> Tensor:
        return self.tokens(x)


@pytest.mark.parametrize("method", ["rotate", "scale"])
def test_what_is_allowed_in_vain_is_not_offered_again(method: str) -> None:
    options = Options(power="3", allow_shifted_outputs=True)
    graph = trace(Encoder().eval().to("meta"), {"x": X.to("meta", torch.float32)})
    (verdict,) = REWRITES[method].planner(graph, options).verdicts
    assert "the model returns it as `output`" in verdict.reason
    assert verdict.reason.endswith("; where all that is returned may change, nothing is left to be compared.")


class SharedTable(nn.Module):
    """What is returned may move, and the table that writes it may not: something else reads that, too."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm, self.inner = nn.Embedding(7, D), nn.RMSNorm(D, eps=1e-5), nn.Linear(D, D)

    def forward(self, ids: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        stream = self.table(ids)
        return stream + self.inner(self.norm(stream)), nn.functional.linear(x, self.table.weight)


class Seen(Tower):
    """The stream is returned beside what is made of it."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        tokens = self.tokens(x)
        return tokens, self.head(torch.relu(self.project(self.norm(tokens))))


@pytest.mark.parametrize(("kind", "helps"), [(Encoder, False), (SharedTable, False), (Seen, True)])
def test_an_option_is_offered_where_it_helps_alone(kind: type[nn.Module], helps: bool) -> None:
    inputs = {"x": X.to("meta", torch.float32)}
    if kind is SharedTable:
        inputs = {"ids": torch.zeros(2, 3, dtype=torch.long, device="meta"), "x": torch.empty(2, 3, D, device="meta")}
    graph = trace(kind().eval().to("meta"), inputs)
    for method in ("rotate", "scale"):
        (verdict,) = plan_graph(graph, Options(power="3"), method).verdicts
        (with_it,) = plan_graph(graph, Options(power="3", allow_shifted_outputs=True), method).verdicts
        assert (with_it.converted, "--allow-shifted-outputs lets" in verdict.reason) == (helps, helps)
        if kind is SharedTable:
            assert verdict.reason.endswith(f"for then {with_it.reason}")
            assert "`table.weight`" in verdict.reason
