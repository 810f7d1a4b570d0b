"""Random residual networks, built from a description so that a failing one shrinks to a few words.

A network is a source, a list of steps on one current value (batch, tokens, width), and a head. Steps are residual
blocks, things the stream passes through, features that read it, and moves between several streams.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from normconvert.options import Options
from tests.support.network_norms import FEATURES, LEAKS, NORMS
from tests.support.network_ops import ACTIONS, DETOURS, PASSES, detour
from tests.support.network_parts import IN_PLACE, JOINS, JOINS_OPAQUE, SCALES, WRITERS, Op, Size, linear, param, rows

VOCAB = 11
MOST = 99
"""More steps than a network has."""
ALL_JOINS = {**JOINS, **IN_PLACE, **JOINS_OPAQUE}


@dataclass(frozen=True)
class Step:
    """One step: ``name`` is a row of the table that belongs to ``kind``.

    Attributes:
        kind: ``block``, ``pass``, ``feature``, ``leak``, ``again``, ``stash``, ``merge``, ``second`` or ``detour``.
        name: the row; of a block the writer, of a merge the join, of a second stream its source.
        norm, scale, join: of a block.
        post: ``branch`` puts a norm behind the scale, ``stream`` behind the join (Post-LN), ``both`` a norm each side.
        share: the part of a block taken from the block before: ``norm``, ``writer``, ``scale`` or nothing.
        inline: parts run without their hooks, as if their code stood in the block.
    """

    kind: str
    name: str = ""
    norm: str = "layer_norm"
    scale: str = "none"
    join: str = "add"
    post: str = ""
    share: str = ""
    inline: bool = False
    action: str = "nothing"


OPTIONS = Options(min_gain=1)


@dataclass(frozen=True)
class Case:
    """A network, its sizes and the plan's options."""

    source: str = "embedding"
    steps: tuple[Step, ...] = ()
    head: str = "linear"
    batch: int = 2
    tokens: int = 3
    width: int = 4
    options: Options = OPTIONS
    seed: int = 0


# ---------------------------------------------------------------------------------------------------------------------
# Sources: (kind of input, how it becomes the first value)


def _embed(
    function: Callable[[Any, Tensor], Tensor], **parts: Callable[[Size], nn.Parameter]
) -> Callable[[Size], nn.Module]:
    return lambda s: Op(function, e=nn.Embedding(VOCAB, s.width), **{name: make(s) for name, make in parts.items()})


def _positions(m: Any, ids: Tensor) -> Tensor:
    return m.e(ids) + m.q(torch.arange(ids.shape[1], device=ids.device))


def _interpolated(m: Any, x: Tensor) -> Tensor:
    y = m.e(x)
    grid = F.interpolate(m.p, size=y.shape[2:], mode="bilinear", align_corners=False)
    return rows(y + grid)


def _table(s: Size) -> nn.Parameter:
    return param(16, s.width)


def _vector(s: Size) -> nn.Parameter:
    return param(s.width)


SOURCES: dict[str, tuple[str, Callable[[Size], nn.Module]]] = {
    "embedding": ("ids", _embed(lambda m, i: m.e(i))),
    "learned_positions": ("ids", _embed(lambda m, i: m.e(i) + m.p[: i.shape[1]], p=_table)),
    "position_table": ("ids", lambda s: Op(_positions, e=nn.Embedding(VOCAB, s.width), q=nn.Embedding(16, s.width))),
    "scaled": ("ids", _embed(lambda m, i: m.e(i) * 2.0 + m.p[: i.shape[1]][None], p=_table)),
    "gained": ("ids", _embed(lambda m, i: m.e(i) * m.p, p=_vector)),
    "one_hot": ("ids", lambda s: Op(lambda m, i: F.one_hot(i, VOCAB).to(m.w.dtype) @ m.w, w=param(VOCAB, s.width))),
    "functional": ("ids", lambda s: Op(lambda m, i: F.embedding(i, m.w), w=param(VOCAB, s.width))),
    "indexed": ("ids", lambda s: Op(lambda m, i: m.w[i], w=param(VOCAB, s.width))),
    "projected": ("ids", lambda s: Op(lambda m, i: m.l(m.e(i)), e=nn.Embedding(VOCAB, 3), l=nn.Linear(3, s.width))),
    "twice": ("ids", _embed(lambda m, i: m.e(i) + m.e(i.flip(1)))),
    "same_positions": ("ids", _embed(lambda m, i: m.e(i) + m.e.weight[: i.shape[1]])),
    "normed": ("ids", lambda s: Op(lambda m, i: m.n(m.e(i)), e=nn.Embedding(VOCAB, s.width), n=nn.LayerNorm(s.width))),
    "sinusoids": ("ids", _embed(lambda m, i: m.e(i) + torch.arange(i.shape[1], device=i.device)[:, None].sin())),
    "floats": ("floats", lambda s: nn.Identity()),
    "floats_linear": ("floats", linear),
    "patches": ("pixels", lambda s: Op(lambda m, x: rows(m.e(x)), e=nn.Conv2d(3, s.width, 2, 2))),
    "patches_nobias": (
        "pixels",
        lambda s: Op(lambda m, x: m.e(x).flatten(2).transpose(-1, -2), e=nn.Conv2d(3, s.width, 2, 2, bias=False)),
    ),
    "patches_interpolated": (
        "pixels",
        lambda s: Op(_interpolated, e=nn.Conv2d(3, s.width, 2, 2), p=param(1, s.width, 3, 3)),
    ),
    "patches_gelu": ("pixels", lambda s: Op(lambda m, x: rows(F.gelu(m.e(x))), e=nn.Conv2d(3, s.width, 2, 2))),
    "parameter": (
        "ids",
        lambda s: Op(lambda m, i: m.p.expand(i.shape[0], -1, -1) + 0.0 * i.sum(), p=param(1, s.fix(), s.width)),
    ),
    "queries": ("ids", lambda s: Op(lambda m, i: m.p.repeat(i.shape[0], 1, 1), p=param(1, s.fix(), s.width))),
}

HEADS = ("linear", "tied", "tied_scaled", "norm", "pooled", "first", "returned", "logits_norm", "nothing")


class Block(nn.Module):
    """x + scale(writer(norm(x))), with norms at other places too."""

    def __init__(self, step: Step, size: Size, last: Block | None) -> None:
        super().__init__()
        self.step = step
        self.norm: nn.Module = last.norm if step.share == "norm" and last else NORMS[step.norm](size)
        self.writer: nn.Module = last.writer if step.share == "writer" and last else WRITERS[step.name](size)
        self.scale: nn.Module = last.scale if step.share == "scale" and last else SCALES[step.scale](size)
        self.post = nn.LayerNorm(size.width) if step.post in ("branch", "both") else None
        self.after = nn.LayerNorm(size.width) if step.post in ("stream", "both") else None

    def forward(self, x: Tensor) -> Tensor:
        h = self._run(self.scale, self._run(self.writer, self._run(self.norm, x)))
        h = h if self.post is None else self.post(h)
        y = ALL_JOINS[self.step.join](x, h)
        return y if self.after is None else self.after(y)

    def _run(self, module: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = module.forward(x) if self.step.inline else module(x)
        return y


class Network(nn.Module):
    """The network that a `Case` describes. Its outputs are a dict; those named ``raw...`` may be the stream itself."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        self.size = Size(case.batch, case.tokens, case.width, VOCAB)
        self.input, source = SOURCES[case.source]
        self.source = source(self.size)
        self.steps = nn.ModuleList()
        blocks: list[Block] = []
        for step in case.steps:
            module = self._step(step, blocks)
            if isinstance(module, Block):
                blocks.append(module)
            self.steps.append(module)
        # Nothing stands here that is not used: a norm that no traced input reaches might read anything.
        if case.head != "nothing" or any(step.kind in ("stash", "second") for step in case.steps):
            self.norm = nn.LayerNorm(case.width)
        if case.head not in ("nothing", "norm"):
            self.head = nn.Linear(case.width, VOCAB, bias=False)
        if case.head == "logits_norm":
            self.logits_norm = nn.LayerNorm(VOCAB)
        table: Any = getattr(self.source, "e", None)
        ties = case.head in ("tied", "tied_scaled", "logits_norm") and isinstance(table, nn.Embedding)
        if ties and table.weight.shape == self.head.weight.shape:
            self.head.weight = table.weight

    def _step(self, step: Step, blocks: list[Block]) -> nn.Module:
        size = self.size
        if step.kind == "block":
            return Block(step, size, blocks[-1] if blocks else None)
        if step.kind == "again":
            return blocks[-1] if blocks else nn.Identity()
        if step.kind == "second":
            kind, build = SOURCES[step.name]
            return build(size) if kind == self.input and step.name != self.case.source else self.source
        if step.kind == "detour":
            return detour(step.name, step.action)(size)
        if step.kind == "pass":
            module = PASSES[step.name](size)
            tokens = _tokens_after(module, size)
            size.fixed = size.fixed or tokens != size.tokens
            size.tokens = tokens
            return module
        tables = {"feature": FEATURES, "leak": LEAKS}
        return tables[step.kind][step.name](size) if step.kind in tables else nn.Identity()

    def forward(self, data: Tensor) -> dict[str, Tensor]:
        stream, outputs = self.stream(self.source(data), data)
        return outputs | self._head(stream)

    def stream(self, x: Tensor, data: Tensor, start: int = 0, stop: int = MOST) -> tuple[Tensor, dict[str, Tensor]]:
        """The value before the head, and what was returned on the way; of some of the steps."""
        stash: list[Tensor] = []
        outputs: dict[str, Tensor] = {}
        for number, (step, module) in enumerate(zip(self.case.steps, self.steps, strict=True)):
            if not start <= number < stop:
                continue
            if step.kind in ("block", "pass", "detour", "again"):
                x = module(x)
            elif step.kind in ("feature", "leak"):
                outputs[f"{step.kind}{number}"] = module(x)
            elif step.kind == "stash":
                stash.append(x)
            elif step.kind == "merge" and stash and stash[-1].shape == x.shape:
                x = ALL_JOINS[step.name](x, stash.pop())
            elif step.kind == "second":
                y = module(data)
                if y.shape == x.shape:
                    stash.append(x)
                    x = y
        return x, outputs | {f"stashed{i}": self.norm(y) for i, y in enumerate(stash)}

    def _head(self, x: Tensor) -> dict[str, Tensor]:
        head = self.case.head
        if head in ("linear", "tied"):
            return {"logits": self.head(self.norm(x))}
        if head == "tied_scaled":
            return {"logits": self.norm(x) @ self.head.weight.t() * 0.5}
        if head == "logits_norm":
            return {"logits": self.logits_norm(self.head(self.norm(x)))}
        if head == "pooled":
            return {"logits": self.head(self.norm(x.mean(1)))}
        if head == "first":
            return {"logits": self.head(self.norm(x)[:, 0])}
        if head == "returned":
            return {"raw": x, "logits": self.head(self.norm(x))}
        return {"normed": self.norm(x)} if head == "norm" else {"size": x.new_zeros(1)}


def _tokens_after(module: nn.Module, size: Size) -> int:
    """How many tokens a part leaves; it is run without its hooks on whatever its weights are."""
    with torch.no_grad():
        device = next((p.device for p in [*module.parameters(), *module.buffers()]), torch.device("cpu"))
        x = torch.ones(size.batch, size.tokens, size.width, device=device)
        return int(module.eval()(x).shape[1])


def inputs_for(case: Case, network: Network) -> list[dict[str, Tensor]]:
    """Two inputs of the traced shape, and one of another batch size and, if the network permits, length."""
    generator = torch.Generator().manual_seed(case.seed + 1)

    def make(batch: int, tokens: int) -> dict[str, Tensor]:
        if network.input == "ids":
            return {"data": torch.randint(0, VOCAB, (batch, tokens), generator=generator)}
        h = 2 if tokens % 2 == 0 else 1
        shape = (batch, 3, 2 * h, 2 * (tokens // h)) if network.input == "pixels" else (batch, tokens, case.width)
        return {"data": torch.randn(shape, generator=generator, dtype=torch.float64)}

    same = [make(case.batch, case.tokens) for _ in range(2)]
    if network.size.exact or case.tokens == 1:  # some parts leave a single token as it is
        return same
    return [*same, make(case.batch + 1, case.tokens if network.size.fixed else case.tokens + 2)]


# ---------------------------------------------------------------------------------------------------------------------
# Drawing a description

Pick = Callable[[Sequence[Any]], Any]
"""Chooses one of several things; the first is the simplest."""

SIZES = ((2, 3, 4), (2, 4, 4), (4, 4, 4), (2, 6, 4), (3, 4, 8), (2, 5, 8), (1, 8, 8), (8, 8, 8), (2, 1, 4))
KINDS = ("block",) * 6 + ("pass",) * 3 + ("detour", "feature", "again", "stash", "merge", "second")
HOSTILE = ("leak", "leak", "post", "opaque")


def runnable_inputs(case: Case) -> list[dict[str, Tensor]] | None:
    """What to try a network with; None if it cannot run itself (an in-place write into expanded memory, say)."""
    torch.set_default_dtype(torch.float64)
    try:
        network = Network(case).eval()
        inputs = inputs_for(case, network)
        with torch.no_grad():
            network(**{name: value.clone() for name, value in inputs[0].items()})
            try:
                network(**{name: value.clone() for name, value in inputs[-1].items()})
            except RuntimeError:
                return inputs[:2]  # traced for this shape only
        return inputs
    except (RuntimeError, IndexError, ValueError, AssertionError):
        return None
    finally:
        torch.set_default_dtype(torch.float32)


def _mostly(pick: Pick, usual: str, table: Iterable[str]) -> str:
    """The usual row, or as often any."""
    return usual if pick((True, False)) else str(pick(tuple(table)))


def _describe_step(pick: Pick, kinds: Sequence[str]) -> Step:
    kind = pick(kinds)
    if kind in ("block", "post", "opaque"):
        return Step(
            "block",
            name=_mostly(pick, "linear", WRITERS),
            norm=_mostly(pick, "layer_norm", NORMS),
            scale=_mostly(pick, "none", SCALES),
            join=pick(tuple(JOINS_OPAQUE)) if kind == "opaque" else _mostly(pick, "add", {**JOINS, **IN_PLACE}),
            post=pick(("stream", "both") if kind == "post" else ("", "", "", "branch")),
            share=pick(("", "", "", "norm", "writer", "scale")),
            inline=pick((False, False, True)),
        )
    if kind == "detour":
        return Step(kind, pick(tuple(DETOURS)), action=pick(tuple(ACTIONS)))
    tables: dict[str, Iterable[str]] = {
        "pass": PASSES,
        "feature": FEATURES,
        "leak": LEAKS,
        "merge": JOINS,
        "second": SOURCES,
    }
    return Step(kind, pick(tuple(tables[kind])) if kind in tables else "")


def describe(pick: Pick) -> Case:
    """A random network; one in four has steps that may be hostile to conversion."""
    batch, tokens, width = pick(SIZES)
    kinds = pick((KINDS, KINDS, KINDS, KINDS + 2 * HOSTILE))
    return Case(
        source=_mostly(pick, "embedding", SOURCES),
        steps=tuple(_describe_step(pick, kinds) for _ in range(pick(range(6)))),
        head=pick(HEADS),
        batch=batch,
        tokens=tokens,
        width=width,
        options=Options(
            tied=pick(("center", "untie")),
            min_gain=pick((1, 2, 3)),
            allow_shifted_outputs=pick((False, True)),
            fold=pick((False, True)),
        ),
        seed=pick((0, 1, 2, 3)),
    )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Random networks for hypothesis, which shrinks the description of one that fails."""
    return describe(lambda choices: draw(st.sampled_from(choices)))
