"""How an output is loaded: lines of Python, true as they are printed."""

from __future__ import annotations

import json
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from normconvert.apply.model_card import ORIGINAL, OWN, SHIPPED, TRUST, auto_class, remote_code
from normconvert.options import OF_TENSORS
from normconvert.plan.conversion_record import fit_alone, structural_edits

if TYPE_CHECKING:
    from normconvert.result import Report


def show_loading(console: Console, report: Report) -> None:
    """The lines of Python that load an output."""
    for label, line in zip_longest(("load it",), how_to_load(report), fillvalue=""):
        # Code to be copied is never wrapped.
        console.print(Text.assemble((f"  {label:14}", "dim"), (line, "cyan")), soft_wrap=True)


def how_to_load(report: Report) -> list[str]:
    """Lines of Python that load the output: as converted, and in the library if that can."""
    out = report.out or ""
    code, named, local = remote_code(Path(out)), _literal(out), _literal(f"local-dir:{out}")
    trust = TRUST if code == OWN else ""
    if report.library == "torch":
        return [f"model = normconvert.load({named}, arch={_literal(report.factory or '')}{TRUST})"]
    lines = [f"model = normconvert.load({named}{trust})"]
    alone = fit_alone(report.plan.modules) and not structural_edits(Path(out))  # of conversions before this one
    if not alone and (report.library == "timm" or code != SHIPPED):
        return lines
    if report.library == "timm":
        return [*lines, f"model = timm.create_model({local}, pretrained=True)"]
    if report.plan.native:
        return [*lines, f"model = {report.plan.native}.from_pretrained({named})  # the library alone"]
    auto = auto_class(Path(report.out or ""), report.architecture)
    if code != SHIPPED:
        return [*lines, f"model = {auto or report.architecture}.from_pretrained({named}{trust})  # {ORIGINAL}"]
    lines.append(f"model = {auto or report.architecture}.from_pretrained({named}{TRUST if auto else ''})")
    # Where tensors alone were changed, that code is there to refuse other classes and to warn of adapters.
    if auto and report.method in OF_TENSORS and alone:
        lines.append(f"model = {auto}.from_pretrained({named})  # the library alone")
    return lines


def _literal(text: str) -> str:
    """A string as Python reads it, whatever a path's name has in it."""
    return json.dumps(text, ensure_ascii=False)
