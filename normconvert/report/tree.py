"""A model's norms as a tree of modules, layers that are alike drawn once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rich.text import Text
from rich.tree import Tree

from normconvert.report.console import BAD, FAINT, GOOD, HEAD, NO, YES, centring_points, verdict_lines
from normconvert.report.words import becomes

if TYPE_CHECKING:
    from normconvert.plan import Plan


@dataclass
class _Node:
    labels: list[Text] = field(default_factory=list)
    children: dict[str, _Node] = field(default_factory=dict)


def norm_tree(root: str, plan: Plan, *, verbose: bool = False) -> Tree:
    """The tree of the norms with their verdicts, and of the places where a centring operation is inserted.

    Args:
        root: what the whole is called.
        plan: its verdicts and module edits.
        verbose: draw every layer.
    """
    top = _Node()
    for name, side in centring_points(plan):
        _at(top, name).labels.append(Text.assemble(("⊖ ", "cyan"), f"{side} centred"))
    for converted, sign, style in ((True, YES, GOOD), (False, NO, BAD)):
        verdicts = [v for v in plan.verdicts if v.converted is converted]
        for name, kind, _, count in verdict_lines(verdicts, verbose=verbose):
            change = f"{kind} → {becomes(plan.method)}" if converted else f"{kind} stays"
            times = (f"  ×{count}", FAINT) if count > 1 else ""
            _at(top, name).labels.append(Text.assemble((f"{sign} ", style), change, times))
    tree = Tree(Text(root, HEAD), guide_style=FAINT)
    _draw(top, tree)
    return tree


def _at(node: _Node, name: str) -> _Node:
    for part in _parts(name):
        node = node.children.setdefault(part, _Node())
    return node


def _parts(name: str) -> list[str]:
    """The components of a name; a number stays with the list that it counts: ``h.{0-3}``, not ``h`` and ``{0-3}``."""
    parts: list[str] = []
    for part in name.split(".") if name else []:
        if parts and part[0] in "{0123456789":
            parts[-1] += f".{part}"
        else:
            parts.append(part)
    return parts


def _draw(node: _Node, tree: Tree) -> None:
    for name, child in node.children.items():
        while len(child.children) == 1 and not child.labels:
            ((below, child),) = child.children.items()
            name = f"{name}.{below}"
        _draw(child, tree.add(_line(name, child.labels)))


def _line(name: str, labels: list[Text]) -> Text:
    return Text("  ").join([Text(name), *labels]) if labels else Text(name, "bold")
