"""A model's norms as a tree in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text
from rich.tree import Tree

from normconvert.report.blocks import CENTRED, CONVERTED, KEPT, Block, Chip, model_blocks

if TYPE_CHECKING:
    from normconvert.plan.conversion_plan import Plan

SIGNS = {CONVERTED: ("✓", "green"), KEPT: ("✗", "bold red"), CENTRED: ("⊖", "cyan")}
"""State of a chip -> its sign and colour."""


def norm_tree(root: str, plan: Plan, *, verbose: bool = False) -> Tree:
    """The tree of the norms with their verdicts, and of the places where a centring operation is inserted.

    Args:
        root: what the whole is called.
        plan: its verdicts and module edits.
        verbose: draw every layer.
    """
    tree = Tree(Text(root, "bold"), guide_style="dim")
    _draw(model_blocks(root, plan, verbose=verbose), tree)
    return tree


def _draw(block: Block, tree: Tree) -> None:
    for child in block.children.values():
        labels = [_label(chip) for chip in child.chips]
        line = Text("  ").join([Text(child.name), *labels]) if labels else Text(child.name, "bold")
        _draw(child, tree.add(line))


def _label(chip: Chip) -> Text:
    sign, style = SIGNS[chip.state]
    times = (f"  ×{chip.count}", "dim") if chip.count > 1 else ""
    return Text.assemble((f"{sign} ", style), chip.text, times)
