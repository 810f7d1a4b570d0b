"""A model as nested blocks with its norms in them, layers that are alike drawn once: for the terminal and for HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from normconvert.wording.grouping import Row, collapse
from normconvert.wording.words import becomes

if TYPE_CHECKING:
    from normconvert.plan.conversion_plan import Plan, Verdict

CONVERTED, KEPT, CENTRED = "converted", "kept", "centred"
INSERTED = ("center", "compress")
"""Module edits that insert an operation."""


@dataclass(frozen=True)
class Chip:
    """Something that is said of a module.

    Attributes:
        state: ``converted``, ``kept`` or ``centred``.
        text: what happens, in a few words.
        reason: why, in a sentence; empty for a centring operation.
        count: how many modules it is said of.
    """

    state: str
    text: str
    reason: str = ""
    count: int = 1


@dataclass
class Block:
    """A module, or a list of modules that are alike.

    Attributes:
        name: path from the block around it: ``h.{0-11}``.
        chips: what is said of it.
        children: blocks inside it.
    """

    name: str
    chips: list[Chip] = field(default_factory=list)
    children: dict[str, Block] = field(default_factory=dict)


def model_blocks(root: str, plan: Plan, *, verbose: bool = False) -> Block:
    """The model as a tree of blocks, with nothing in it that has no norm and no centring operation.

    Args:
        root: what the whole is called.
        plan: its verdicts and module edits.
        verbose: every layer for itself.
    """
    top = Block(root)
    for name, side in centring_points(plan):
        change = "compressed" if plan.method == "crmsnorm" else "centred"
        _at(top, name).chips.append(Chip(CENTRED, f"{side} {change}"))
    for line in norm_lines(plan.verdicts, verbose=verbose):
        state, change = (CONVERTED, f"→ {becomes(plan.method)}") if line.converted else (KEPT, "stays")
        _at(top, line.name).chips.append(Chip(state, f"{line.kind} {change}", line.reason, line.count))
    return _joined(top)


@dataclass(frozen=True)
class NormLine:
    """One norm, or several that are alike: their paths, kind, verdict, reason and number."""

    name: str
    kind: str
    converted: bool
    reason: str
    count: int = 1


def norm_lines(verdicts: Sequence[Verdict], *, verbose: bool = False) -> list[NormLine]:
    """A line for each norm if ``verbose``, else alike ones together; in the order of execution."""
    if verbose:
        return [NormLine(v.path, v.kind, v.converted, v.reason) for v in verdicts]
    groups = collapse(Row(v.path, v.reason, (v.kind, v.converted, v.code)) for v in verdicts)
    return [NormLine(g.name, g.key[0], g.key[1], g.text, g.count) for g in groups]  # type: ignore[index]


def centring_points(plan: Plan) -> list[tuple[str, str]]:
    """(module, ``output`` or ``input``) of every centring operation, alike ones together."""
    rows = (Row(edit["path"], "", edit["side"]) for edit in plan.modules if edit["op"] in INSERTED)
    return [(group.name or "the model", str(group.key)) for group in collapse(rows)]


def _at(block: Block, name: str) -> Block:
    for part in _parts(name):
        block = block.children.setdefault(part, Block(part))
    return block


def _parts(name: str) -> list[str]:
    """The components of a name; a number stays with the list that it counts: ``h.{0-3}``, not ``h`` and ``{0-3}``."""
    parts: list[str] = []
    for part in name.split(".") if name else []:
        # A group of layers begins with a brace: `{0-11}`.
        if parts and part[0] in "{0123456789":
            parts[-1] += f".{part}"
        else:
            parts.append(part)
    return parts


def _joined(block: Block) -> Block:
    """Without blocks that hold nothing but one other block."""
    children = []
    for child in block.children.values():
        # A module with a chip stays: what is said of it is not said of the one inside.
        while len(child.children) == 1 and not child.chips:
            (below,) = child.children.values()
            child = Block(f"{child.name}.{below.name}", below.chips, below.children)
        children.append(_joined(child))
    return Block(block.name, block.chips, {child.name: child for child in children})
