"""What a person reads of an identification."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

from normconvert.identification.words import explained, few
from normconvert.report.console import FAINT, GOOD, HEAD, MANY, indented, two_columns

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from normconvert.identification import Candidate, Identification, Near

FIRST = 4
"""So many tensors of each kind of difference are listed without -v."""


def show_identification(console: Console, found: Identification, *, verbose: bool = False) -> None:
    """Every architecture that fits, or the nearest and what differs."""
    console.print(Text(found.path, HEAD), soft_wrap=True)
    table = two_columns()
    table.add_row("tensors", str(found.tensors))
    chosen = found.chosen
    if chosen is not None:
        table.add_row("architecture", Text.assemble((chosen.name, GOOD), f" ({_kind(chosen)})"))
    if chosen is None and found.exact:
        many = f"{len(found.exact)} architectures, which may compute differently"
        table.add_row("fits", Text(many, "yellow"))
    if len(found.exact) > 1:
        others = [c for c in found.exact if c is not chosen]
        listed = others if verbose or len(others) <= MANY else others[: MANY - 1]
        for i, candidate in enumerate(listed):
            table.add_row("fits as well" if chosen and not i else "", f"{candidate.name} ({_kind(candidate)})")
        if len(others) > len(listed):
            table.add_row("", f"and {len(others) - len(listed)} more (-v)")
    if not found.exact:
        table.add_row("fits", Text("no architecture that is known", "yellow"))
    for stated in found.stated:
        # A file's name that fits nothing is no statement, and would only distract.
        if any(stated.name == c.name for c in found.exact) or stated.where in ("config.json", "normconvert.json"):
            table.add_row("stated", f"{stated.name} ({stated.where})")
    shown = chosen or (found.exact[0] if found.exact else None)
    if shown is not None and shown.library == "transformers":
        _show_config(table, shown, verbose)
    for note in (*found.notes, *([found.origin] if found.origin else [])):
        table.add_row("note", note)
    console.print(indented(table))
    for near in found.nearest:
        _show_near(console, near, verbose)
    if found.arch is None and any(c.library == "timm" for c in found.exact):
        console.print(indented(Text("say which by --arch timm:NAME when you convert it", FAINT)))


def _kind(candidate: Candidate) -> str:
    if candidate.library == "transformers":
        return f"transformers: {few(candidate.classes, 3)}"
    return f"timm, {f'{candidate.num_classes} classes' if candidate.num_classes else 'no classifier'}"


def _size(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "a number"


def _show_config(table: Table, shown: Candidate, verbose: bool) -> None:
    fixed = [f"{key.replace('*', ' × ')} = {value}" for key, value in shown.config.items()]
    table.add_row("shapes fix", few(fixed, len(fixed) if verbose else MANY))
    table.add_row("but not", few(shown.unfixed, len(shown.unfixed) if verbose else MANY) or "what they do not need")


def _show_near(console: Console, near: Near, verbose: bool) -> None:
    names = few(near.names, len(near.names) if verbose else 3)
    kind = f"{near.library}: {few(near.classes, 3)}" if near.classes else near.library
    console.print(Text.assemble("\nnearest  ", (names, "yellow"), (f"  ({kind})", FAINT)), soft_wrap=True)
    if hint := explained(near):
        console.print(indented(Text(hint, GOOD if near.arguments else "yellow")))
    rows = (
        ("missing", [(name, "") for name in near.missing]),
        ("too many", [(name, "") for name in near.extra]),
        ("other shape", [(n, f"{_size(a)} instead of {_size(b)}") for n, a, b in near.reshaped]),
    )
    table = two_columns()
    for what, tensors in rows:
        most = len(tensors) if verbose else FIRST
        for i, (name, text) in enumerate(tensors[:most]):
            table.add_row(f"{len(tensors)} {what}" if not i else "", Text.assemble(name, (f"  {text}", FAINT)))
        if len(tensors) > most:
            table.add_row("", f"and {len(tensors) - most} more (-v)")
    console.print(indented(table))
