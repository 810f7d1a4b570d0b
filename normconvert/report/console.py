"""What a person reads: the summary of a conversion, the tree of a model's norms, the figures of a verification.

Everything is laid out for 80 columns and reads the same in a terminal and in a pipe, but for the colours.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.console import Group as Lines
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from normconvert.report.blocks import INSERTED, centring_points, norm_lines
from normconvert.report.charts import short
from normconvert.report.junit import PARTS
from normconvert.report.loading import show_loading
from normconvert.wording.grouping import Row, collapse
from normconvert.wording.words import becomes, human_bytes, task_metrics_in_words

if TYPE_CHECKING:
    from normconvert.adapters.conversion import AdapterReport
    from normconvert.exporting.export import ExportReport
    from normconvert.plan.conversion_plan import Plan
    from normconvert.result import Report
    from normconvert.verification.fidelity import Fidelity
    from normconvert.verification.record_check import CheckReport

GOOD, BAD, HEAD, FAINT = "green", "bold red", "bold", "dim"
YES, NO = "✓", "✗"
ALLOWED = 0.51
"""Units that a stored weight may be off: the rounding, and a little (`normconvert.verification.stored_weights`)."""
CHANGES = {"rmsnorm": "centring", "crmsnorm": "compressing"}
"""Conversion -> what the operations that it inserts do."""
WORDS = {"center": "centre"}
"""Edit of a plan -> what it is called beside prose, where that is not its own name."""
MANY = 12
"""More lines than this of one kind are cut short without -v."""


def show_summary(
    console: Console,
    report: Report,
    *,
    verbose: bool = False,
    kept: bool = True,
    measures: Mapping[str, Any] | None = None,
) -> None:
    """The result of a conversion, or of a dry run.

    Args:
        console: where to print.
        report: the result.
        verbose: every norm for itself.
        kept: the output stays; say where it is and how to load it.
        measures: what was measured for an HTML report, as
            :meth:`~normconvert.verification.layer_measures.Measures.to_json` gives it.
    """
    dry = report.out is None
    title = _title(report, "dry run, nothing was written" if dry else "", out=report.out if kept else None)
    console.print(title, soft_wrap=True)
    grid = two_columns()
    grid.add_row("architecture", _architecture(report))
    if report.uploaded is not None:
        grid.add_row("on the hub", f"https://huggingface.co/{report.uploaded}")
    grid.add_row("norms", _norms(report.plan))
    if report.method in CHANGES:
        grid.add_row(CHANGES[report.method], _inserted(report.plan))
    grid.add_row("tensors", _tensors(report))
    if report.fidelity is not None:
        grid.add_row("fidelity", figures(report.fidelity))
    elif not dry:
        grid.add_row("fidelity", Text("not verified (--no-verify)", "yellow"))
    for label, told in measured_lines(measures):
        grid.add_row(label, told)
    grid.add_row("seconds", " · ".join(f"{stage} {s:.1f}" for stage, s in report.seconds.items()))
    for note in report.notes:
        grid.add_row("note", note)
    console.print(indented(grid))
    if report.out is not None and kept:
        show_loading(console, report)
    if verbose or measures or (report.plan.kept and report.plan.converted):
        from normconvert.report.tree import norm_tree

        console.print()
        console.print(norm_tree(report.architecture, report.plan, verbose=verbose))
    show_kept(console, report.plan, verbose=verbose)


def measured_lines(measures: Mapping[str, Any] | None) -> Iterator[tuple[str, Text]]:
    """(label, what was found) for what the HTML report has charts of: the error of every layer, as a row of bars."""
    if not measures:
        return
    layers = measures["layers"]
    names = short([layer["name"] for layer in layers])
    for i, (words, key) in enumerate((("float64", "algebra"), (measures["dtype"], "converted"), ("noise", "original"))):
        values = [float(layer[key]) for layer in layers]
        if values:
            worst = max(range(len(values)), key=values.__getitem__)
            told = f" at most {values[worst]:.1g}, at {names[worst]}"
            yield "" if i else "layers", Text.assemble(f"{words:9}", (sparkline(values), "cyan"), (told, FAINT))
    if measures["perplexity"]:
        before, after = measures["perplexity"]["original"], measures["perplexity"]["converted"]
        yield "perplexity", Text(f"{after:.6g}, {before:.6g} before")


def sparkline(values: Sequence[float], width: int = 20) -> str:
    """A row of bars for positive values on a logarithmic scale; neighbours share a bar where there are too many.

    >>> sparkline([1e-16, 1e-15, 1e-14, 0.0])
    '▁▅█▁'
    """
    # Rounded up: the row must not be longer than its width.
    size = max(1, -(-len(values) // width))
    # The largest of those that share a bar: a mean would hide the one layer that is wrong.
    shown = [max(values[i : i + size]) for i in range(0, len(values), size)]
    logs = [math.log10(v) if 0 < v < math.inf else None for v in shown]
    known = [v for v in logs if v is not None]
    low, high = min(known, default=0.0), max(known, default=1.0)
    # Values that are all alike have no range to be divided by.
    levels = (0.0 if v is None else (v - low) / (high - low or 1.0) for v in logs)
    return "".join("▁▂▃▄▅▆▇█"[round(level * 7)] for level in levels)


def show_kept(console: Console, plan: Plan, *, verbose: bool = False) -> None:
    """The norms that stay as they are, and why; alike ones together unless ``verbose``."""
    if plan.kept:
        console.print(Text.assemble("\nkept as they are", style=HEAD), f"({len(plan.kept)} of {len(plan.verdicts)})")
        for line in norm_lines(plan.kept, verbose=verbose):
            console.print(indented(_norm_line(line.name, line.kind, line.count)))
            console.print(indented(Text(line.reason, FAINT), 6))


def show_inspection(console: Console, report: Report, *, verbose: bool = False) -> None:
    """The tree of a model's norms with their verdicts, and what a conversion would edit."""
    from normconvert.report.tree import norm_tree

    plan = report.plan
    console.print(_title(report))
    grid = two_columns()
    grid.add_row("architecture", _architecture(report))
    grid.add_row("norms", _norms(plan) if plan.verdicts else f"none that {report.method} is about")
    for i, other in enumerate(report.others):
        grid.add_row("" if i else "others", other)
    console.print(indented(grid))
    if not plan.verdicts:
        return
    console.print()
    console.print(norm_tree(report.architecture, plan, verbose=verbose))
    reasons = collapse(Row("", v.reason) for v in plan.converted)
    if plan.converted:
        console.print(Text.assemble("\nwhy they convert", style=HEAD))
        for group in reasons:
            console.print(indented(Text.assemble(group.text, (f"  ×{group.count}", FAINT))))
    show_kept(console, plan, verbose=verbose)
    if plan.tensors or plan.modules:
        console.print(Text.assemble("\nwhat a conversion does", style=HEAD))
        grid = two_columns()
        if report.method in CHANGES:
            grid.add_row(CHANGES[report.method], _inserted(plan))
        for op, names in _edit_lines(plan, verbose=verbose):
            grid.add_row(op, names)
        console.print(indented(grid))
    for note in report.notes:
        console.print(Padding(Text.assemble(("note  ", "yellow"), note), (1, 0, 0, 2)))


def show_fidelity(
    console: Console,
    a: str,
    b: str,
    fidelity: Fidelity,
    *,
    verbose: bool = False,
    measures: Mapping[str, Any] | None = None,
) -> None:
    """The figures of a verification, and for each that is out of its limit why; ``measures`` as for a conversion."""
    console.print(Text.assemble((b, HEAD), " against ", (a, HEAD)))
    grid = two_columns()
    grid.add_row("fidelity", figures(fidelity))
    ran = len({row["probe"] for row in fidelity.probes if "skipped" not in row})
    skipped = [row for row in fidelity.probes if "skipped" in row]
    grid.add_row("probes", f"{ran} run" + (f", {len(skipped)} not fit for the original" if skipped else ""))
    for label, told in measured_lines(measures):
        grid.add_row(label, told)
    grid.add_row("result", Text("passed", GOOD) if fidelity.passed else Text("failed", BAD))
    console.print(indented(grid))
    for reason in fidelity.reasons:
        console.print(indented(Text.assemble((f"{NO} ", BAD), reason)))
    if verbose:
        console.print(_probe_table(fidelity))


def show_check(console: Console, report: CheckReport, *, verbose: bool = False) -> None:
    """Whether a converted checkpoint is what its record says, and each thing that is not."""
    console.print(
        Text.assemble((report.output, HEAD), " against the conversion of ", (report.source, HEAD)), soft_wrap=True
    )
    grid = two_columns()
    for part, name in PARTS.items():
        count = sum(finding.part == part for finding in report.findings)
        told = Text.assemble((f"{NO} ", BAD), name, (f"  ×{count}", FAINT)) if count else agrees(True, name)
        grid.add_row(part, told)
    grid.add_row("compared", f"{report.files} files, {human_bytes(report.bytes)}")
    grid.add_row("seconds", " · ".join(f"{stage} {s:.1f}" for stage, s in report.seconds.items()))
    grid.add_row("result", Text("passed", GOOD) if report.passed else Text("failed", BAD))
    for note in report.notes:
        grid.add_row("note", note)
    console.print(indented(grid))
    found = [(f.subject, f.what) for f in report.findings]
    shown = found if verbose or len(found) <= MANY else found[: MANY - 1]
    for subject, what in shown:
        console.print(indented(Text.assemble((f"{NO} ", BAD), (subject, "yellow"), f" {what}")))
    if len(shown) < len(found):
        console.print(indented(Text(f"and {len(found) - len(shown)} more (-v)", FAINT)))


def show_export(console: Console, report: ExportReport) -> None:
    """What was exported, what may vary in it, how close it is."""
    console.print(Text.assemble((report.source, HEAD), " → ", (report.file, HEAD)), soft_wrap=True)
    grid = two_columns()
    grid.add_row("size", human_bytes(report.bytes_written))
    for one in report.files:
        if len(report.files) > 1:
            grid.add_row("file", one.file)
        grid.add_row("holds", " · ".join([report.dtype, *([f"opset {one.opset}"] if one.opset else [])]))
        # Keys and values of all layers are alike: the first pair stands for them.
        shown = [name for name in one.inputs if ".key" not in name and ".value" not in name]
        past = len(one.inputs) - len(shown)
        taken = [f"{name} ({', '.join(map(str, one.inputs[name]))})" for name in shown]
        grid.add_row("inputs", ", ".join([*taken, *([f"{past} keys and values of a past"] if past else [])]))
        free = [f"{what} {_span(*limits)}" for what, limits in one.varies.items()]
        grid.add_row("may vary", ", ".join(free) or "nothing")
        kept = [name for name in one.outputs if not name.startswith("present.")]
        present = len(one.outputs) - len(kept)
        grid.add_row("outputs", ", ".join([*kept, *([f"{present} keys and values"] if present else [])]))
        ran = " and ".join(ENGINES[name] for name in one.engines)
        grid.add_row("verified", f"{one.error:.2g} off the exported model at most, on inputs of {one.checks} kinds")
        grid.add_row("", f"in {ran}")
    if report.against is not None:
        grid.add_row("", f"{report.against:.2g} off the original at most")
    for note in report.notes:
        grid.add_row("note", note)
    console.print(indented(grid))


ENGINES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "torch": "torch"}
"""What a file was run in, as people write it."""


def _span(least: int, most: int | None) -> str:
    return f"from {least}" if most is None else f"{least} to {most}"


def show_adapter(console: Console, report: AdapterReport) -> None:
    """What was converted, and how close it is."""
    console.print(Text.assemble((report.adapter, HEAD), " → ", (report.output, HEAD)), soft_wrap=True)
    grid = two_columns()
    grid.add_row("kind", report.kind)
    grid.add_row("for", report.converted)
    grid.add_row("tensors", f"{len(report.edited)} edited, {report.copied} as they were")
    for note in report.notes:
        grid.add_row("note", note)
    console.print(indented(grid))
    console.print(indented(figures(report.fidelity)))


def figures(fidelity: Fidelity) -> RenderableType:
    """The three figures, each against its limit, and the smaller ones below."""
    table = Table.grid(padding=(0, 2))
    for _ in range(3):
        table.add_column()
    rounding = "not measured" if fidelity.rounding is None else f"{fidelity.rounding:.3g} × the original's"
    rounding_fits = fidelity.rounding is None or fidelity.rounding <= fidelity.rounding_tolerance
    algebra_fits = fidelity.algebra <= fidelity.tolerance
    table.add_row(
        "algebra", f"{fidelity.algebra:.2g} off in float64", _limit(algebra_fits, f"{fidelity.tolerance:.2g}")
    )
    if fidelity.storage is not None:
        table.add_row(
            "weights", f"{fidelity.storage:.2g} units off as stored", _limit(fidelity.storage <= ALLOWED, "0.5")
        )
    table.add_row("rounding", rounding, _limit(rounding_fits, f"{fidelity.rounding_tolerance:g} ×"))
    lines: list[RenderableType] = [
        table,
        Text(f"in use    {task_metrics_in_words(fidelity)}"),
        Text(f"verified  {fidelity.level}", FAINT),
    ]
    lines += [Text(remark, FAINT) for remark in fidelity.remarks]
    if fidelity.mean_over_rms is not None:
        lines.append(Text(f"|mean|/rms at the converted norms {fidelity.mean_over_rms:.2g} at most", FAINT))
    if fidelity.worst_module is not None:
        lines.append(Text.assemble("the two part first at ", (fidelity.worst_module, HEAD)))
    return Lines(*lines)


def agrees(good: bool, text: str) -> Text:
    """``text`` with a tick or a cross."""
    return Text.assemble((f"{YES if good else NO} ", GOOD if good else BAD), text)


def _title(report: Report, remark: str = "", *, out: str | None = None) -> Text:
    text = Text.assemble((report.source, HEAD))
    if out is not None:
        text.append(" → ").append(out, HEAD)
    if remark:
        text.append(f"  ({remark})", "yellow")
    return text


def indented(what: RenderableType, by: int = 2) -> Padding:
    """Moved to the right by so many columns."""
    return Padding(what, (0, 0, 0, by))


def two_columns() -> Table:
    """A table of faint words, and of what there is to say."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style=FAINT, no_wrap=True, min_width=12)
    grid.add_column(overflow="fold")
    return grid


def _architecture(report: Report) -> str:
    stored = f" stored as {report.stored}" if report.stored != report.dtype else ""
    return f"{report.architecture} ({report.library}, {report.dtype}{stored})"


def _norms(plan: Plan) -> Text:
    """``9 of 12 norms → RMSNorm (8 LayerNorm, 1 LayerNorm2d)``."""
    share = len(plan.converted), len(plan.verdicts)
    style = GOOD if share[0] == share[1] else "yellow" if share[0] else BAD
    kinds = Counter(v.kind for v in plan.converted)
    of_kinds = " (" + ", ".join(f"{n} {kind}" for kind, n in kinds.items()) + ")" if len(kinds) > 1 else ""
    one = f"{next(iter(kinds)) if len(kinds) == 1 else 'norms'} → {becomes(plan.method)}"
    return Text.assemble((f"{share[0]} of {share[1]}", style), f" {one}{of_kinds}")


def _inserted(plan: Plan) -> str:
    points = [f"{side} of {name}" for name, side in centring_points(plan)]
    count = sum(edit["op"] in INSERTED for edit in plan.modules)
    if not count:
        return "no operation inserted"
    return f"{count} operation{'s' if count > 1 else ''} inserted: " + ", ".join(points)


def _tensors(report: Report) -> str:
    if report.out is None:
        return f"{len(report.plan.tensors)} to be edited"
    edited, copied = report.tensors_edited, report.tensors_copied
    return f"{edited} edited, {copied} copied as they are; {human_bytes(report.bytes_written)} written"


def _edit_lines(plan: Plan, *, verbose: bool) -> Iterable[tuple[str, str]]:
    """(operations, modules and their tensors) of the tensor edits, alike ones together."""
    leaves: dict[tuple[str, str], list[str]] = {}
    for name, edits in plan.tensors.items():
        module, _, leaf = name.rpartition(".")
        ops = ", ".join(dict.fromkeys(WORDS.get(edit["op"], edit["op"]).replace("_", " ") for edit in edits))
        leaves.setdefault((module, ops), []).append(leaf)
    lines: dict[str, list[str]] = {}
    for group in collapse(Row(module, "|".join(names), ops) for (module, ops), names in leaves.items()):
        lines.setdefault(str(group.key), []).append(f"{group.name}.{group.text}".lstrip("."))
    for ops, named in lines.items():
        # "1 more" would take the line that the one itself could have.
        more = len(named) - MANY + 1
        yield ops, "\n".join(named if verbose or more <= 1 else [*named[: MANY - 1], f"and {more} more (-v)"])


def _norm_line(name: str, kind: str, count: int) -> Text:
    times = (f"  ×{count}", FAINT) if count > 1 else ""
    return Text.assemble((name or "the model itself", "yellow"), (f"  {kind}", FAINT), times)


def _limit(fits: bool, limit: str) -> Text:
    return Text.assemble((YES if fits else NO, GOOD if fits else BAD), (f" at most {limit}", FAINT))


def _probe_table(fidelity: Fidelity) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style=FAINT)
    for heading in ("probe", "output", "algebra", "original", "converted"):
        table.add_column(heading, justify="left" if heading in ("probe", "output") else "right")
    for row in fidelity.probes:
        if "skipped" in row:
            table.add_row(row["probe"], Text(row["skipped"], FAINT))
        else:
            numbers = [row[key] for key in ("algebra", "original_error", "converted_error")]
            table.add_row(row["probe"], row["output"], *("" if n is None else f"{n:.2g}" for n in numbers))
    return table
