"""The HTML report: one file that needs no network, made from a command's JSON document and nothing else.

Every text goes through the template's escaping. A content security policy lets the report's own two scripts run, known
by their hashes, and nothing else: no other script, no request.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normconvert import __version__
from normconvert.benchmark.result import Row
from normconvert.plan.conversion_plan import Plan
from normconvert.report.benchmark import machine_in_words, milliseconds
from normconvert.report.charts import bench_chart, layer_chart, norm_chart
from normconvert.report.junit import PARTS
from normconvert.report.loading import how_to_load
from normconvert.report.parts import badge, bars, plan_view, tile
from normconvert.report.runs import batch_section, swap_section
from normconvert.result import Report
from normconvert.verification.folder_comparison import Finding
from normconvert.verification.limits import outcomes
from normconvert.wording.words import becomes, human_bytes, percent

if TYPE_CHECKING:
    from jinja2 import Template
    from markupsafe import Markup

ASSETS = Path(__file__).parent / "assets"
SCRIPTS = ("chart.umd.min.js", "report.js")

Document = dict[str, Any]

EMPTY: dict[str, Any] = {
    "about": "", "tiles": [], "reasons": [], "notes": [], "charts": [], "figures": [], "worst": None, "remarks": [],
    "probes": [], "work": [], "seconds": [], "load": [], "findings": [], "kept": [], "converted": [], "bench": None,
    "table": None, "tails": None,
}  # fmt: skip
"""What a section of the page may leave out."""


def html_report(document: Document) -> str:
    """The page for the document of any command that converts, verifies or checks, or for its error."""
    from markupsafe import Markup

    sections = [{**EMPTY, **section} for section in _sections(document)]
    if document.get("bench"):  # measured before, shown beside
        sections.append({**EMPTY, **_benchmark(document["bench"])})
    charts = {f"chart-{i}-{j}": chart for i, s in enumerate(sections) for j, chart in enumerate(s["charts"])}
    scripts = [Markup((ASSETS / name).read_text(encoding="utf-8")) for name in SCRIPTS]  # ours, not escaped
    return _template().render(
        title=_title(document),
        command=document.get("command_line"),
        error=document.get("error"),
        kind=document.get("kind"),
        sections=sections,
        text=document.get("text"),
        digits=document.get("digits"),
        charts=_embedded(charts),
        style=Markup((ASSETS / "report.css").read_text(encoding="utf-8")),
        scripts=scripts if charts else [],
        # By hash, not by "unsafe-inline": that would let a script run that got in by a name.
        policy=" ".join(f"'sha256-{_hash(script)}'" for script in scripts) if charts else "'none'",
        version=__version__,
    )


@lru_cache(maxsize=1)
def _template() -> Template:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(ASSETS),
        # Not jinja's default. Names and reasons come from checkpoints, that is from anyone.
        autoescape=True,
        # A misspelt field is an error, not a gap in the page.
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["prose"] = _prose
    return environment.get_template("report.html.jinja")


def _prose(text: Any) -> Markup:
    """A sentence of ours: what stands in backticks is code."""
    from markupsafe import Markup

    parts = str(text).split("`")
    if len(parts) % 2 == 0:  # a backtick that is no mark-up
        return Markup("{}").format(text)
    # Filled in by Markup's own format, which escapes what it is given.
    marked = (Markup("<code>{}</code>" if i % 2 else "{}").format(part) for i, part in enumerate(parts))
    return Markup("").join(marked)


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _embedded(data: Any) -> Markup:
    """JSON for a script element: nothing in it can end the element or begin another."""
    from markupsafe import Markup

    text = json.dumps(data, allow_nan=False)  # ASCII only
    # A script element ends at its end tag wherever that stands, in a string as well.
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _title(document: Document) -> str:
    if "reports" in document:
        return "normconvert demo"
    if document.get("command") == "check":
        return f"{document['output']}, checked"
    if "original" in document:
        return f"{document['converted']} against {document['original']}"
    inner = document.get("report", document)
    if "source" not in inner:
        return "normconvert"
    out = inner.get("out") or inner.get("file") or inner.get("converted")
    return f"{inner['source']} → {out}" if out else str(inner["source"])


def _sections(document: Document) -> Iterator[dict[str, Any]]:
    if document.get("command") == "check" and "error" not in document:
        yield _check(document)
    elif "reports" in document:
        for report in document["reports"]:
            yield _conversion(report)
    elif "report" in document:  # an error that came with what was known by then
        yield _conversion(document["report"])
    elif document.get("command") == "swap" and "error" not in document:
        yield swap_section(document)
    elif document.get("command") == "run" and "error" not in document:
        yield batch_section(document)
    elif "plan" in document and "source" in document:
        yield _conversion(document)
    elif "probes" in document:
        yield _verification(document)
    elif document.get("command") == "bench" and "error" not in document:
        yield _benchmark(document)
    elif "error" not in document:
        yield _other(document)


def _conversion(data: Document) -> dict[str, Any]:
    """A conversion, a dry run or an inspection."""
    plan = Plan.from_json(data["plan"])
    fidelity = data.get("fidelity")
    stored = f", stored as {data['stored']}" if data["stored"] != data["dtype"] else ""
    # Only what how_to_load() asks for: the page is made of the document alone.
    report = Report(data["source"], data["library"], data["architecture"], data["method"], data["out"], plan)
    return {
        "heading": f"{data['source']} → {data['out']}" if data["out"] else data["source"],
        "about": f"{data['architecture']} · {data['library']} · {data['dtype']}{stored}",
        "badge": badge(fidelity["passed"] if fidelity else None, "not verified" if data["out"] else "nothing written"),
        "tiles": [*_norm_tiles(plan), *_tiles(fidelity, data.get("measures"))],
        **plan_view(plan, data["architecture"]),
        **_figures(fidelity, data.get("measures"), plan.method),
        "work": list(_work(data)),
        "seconds": bars(data["seconds"]),
        "notes": [*data["notes"], *_note(data)],
        "load": how_to_load(report) if data["out"] else [],
    }


def _verification(data: Document) -> dict[str, Any]:
    """Two checkpoints held against each other."""
    plan = Plan.from_json(data["plan"]) if data.get("plan") else None
    measures = data.get("measures")
    about = f"{measures['architecture']} · {measures['library']} · run in {measures['dtype']}" if measures else ""
    return {
        "heading": f"{data['converted']} against {data['original']}",
        "about": about,
        "badge": badge(data["passed"], ""),
        "tiles": [*(_norm_tiles(plan) if plan else ()), *_tiles(data, measures)],
        **(plan_view(plan, measures["architecture"] if measures else "the model") if plan else {}),
        **_figures(data, measures, plan.method if plan else ""),
        "work": list(_sizes(measures)),
        "notes": list(_note(data)),
    }


def _check(data: Document) -> dict[str, Any]:
    """A converted checkpoint held against its record."""
    findings = [Finding(**finding) for finding in data["findings"]]
    counts = {part: sum(f.part == part for f in findings) for part in PARTS}
    return {
        "heading": data["output"],
        "about": f"converted again from {data['source']} and compared byte for byte",
        "badge": badge(data["passed"], ""),
        "tiles": [tile("compared", human_bytes(data["bytes"]), f"{data['files']} files")],
        "parts": [(name, counts[part]) for part, name in PARTS.items()],
        "findings": [(f.subject, f.what) for f in findings],
        "work": [],
        "seconds": bars(data["seconds"]),
        "notes": data["notes"],
        "load": [],
    }


def _benchmark(data: Document) -> dict[str, Any]:
    """Times of several versions of a model."""
    sizes = ", ".join(f"{version} {human_bytes(n)}" for version, n in data["parameter_bytes"].items())
    about = f"{data['architecture']} · {data['library']} · run in {data['dtype']}"
    return {
        "heading": _title(data),
        "about": f"{about} on {data['device']}: {machine_in_words(data['machine'])}",
        "badge": ("plain", ""),
        "work": [("norms", f"{data['norms']['converted']} of {data['norms']['total']}"), ("parameters", sizes)],
        **_bench_view(data),
    }


def _bench_view(data: Document) -> dict[str, Any]:
    rows = [Row.from_json(row) for row in data["rows"]]
    chart = bench_chart(rows)
    versions = list(dict.fromkeys(version for row in rows for version in row.milliseconds))
    table = [
        (row.name, *(milliseconds(row.milliseconds[v].median) if v in row.milliseconds else "–" for v in versions))
        for row in rows
    ]
    failures = [f"{row.name}: {version} not measured: {why}" for row in rows for version, why in row.failures.items()]
    return {"bench": (versions, table), "charts": [chart] if chart is not None else [], "notes": failures}


def _other(data: Document) -> dict[str, Any]:
    """Any other command: its figures by their names."""
    left_out = {"command", "command_line", "exit_status", "notes"}
    rows = [(key.replace("_", " "), _told(value)) for key, value in data.items() if key not in left_out]
    return {
        "heading": _title(data),
        "about": str(data.get("command", "")),
        "badge": ("plain", ""),
        "work": [(key, value) for key, value in rows if value],
        "notes": data.get("notes", []),
    }


def _told(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_told(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(_told(item) for item in value)
    return "" if value is None else str(value)


def _norm_tiles(plan: Plan) -> Iterator[dict[str, str]]:
    done, total = len(plan.converted), len(plan.verdicts)
    state = "good" if done == total else "warn"
    yield tile("norms", f"{done} of {total}", f"→ {becomes(plan.method)}", state)


def _tiles(fidelity: Document | None, measures: Document | None) -> Iterator[dict[str, str]]:
    if fidelity:
        for outcome in outcomes(fidelity):
            name = outcome.figure.name
            state = {None: "", True: "good", False: "bad"}[outcome.passed]
            if name == "algebra":
                yield tile("algebra, float64", f"{outcome.found:.2g}", outcome.bound, state)
            elif name == "rounding" and outcome.found is not None:
                yield tile("rounding", f"{outcome.found:.3g} ×", f"the original's, {outcome.bound}", state)
            elif name == "top1" and outcome.found is not None:
                yield tile("top-1 the same", percent(outcome.found), outcome.bound, state)
            elif name == "kl" and outcome.found is not None:
                yield tile("KL divergence", f"{outcome.found:.1g}", outcome.bound or "nats", state)
    perplexity = measures.get("perplexity") if measures else None
    if perplexity:
        before, after = perplexity["original"], perplexity["converted"]
        tokens = f"{before:.6g} before, {perplexity['tokens']} tokens"
        yield tile("perplexity", f"{after:.6g}", tokens)


def _figures(fidelity: Document | None, measures: Document | None, method: str) -> dict[str, Any]:
    charts = []
    if measures:
        charts = [
            chart for chart in (layer_chart(measures), norm_chart(measures, becomes(method))) if chart is not None
        ]
    if not fidelity:
        return {"charts": charts}
    return {
        "figures": list(outcomes(fidelity)),
        "reasons": fidelity["reasons"],
        "worst": fidelity["worst_module"],
        "remarks": [f"Verified: {fidelity.get('level', 'standard')}", *fidelity.get("remarks", ())],
        "probes": [_probe(row) for row in fidelity["probes"]],
        "charts": charts,
    }


def _probe(row: Document) -> tuple[str, ...]:
    if "skipped" in row:
        return (row["probe"], row["skipped"], "", "", "")
    numbers = (row[key] for key in ("algebra", "original_error", "converted_error"))
    return (row["probe"], row["output"], *("–" if n is None else f"{float(n):.2g}" for n in numbers))


def _work(data: Document) -> Iterator[tuple[str, str]]:
    """What was done to the files."""
    if data["out"]:
        yield "tensors", f"{data['tensors_edited']} edited, {data['tensors_copied']} copied as they are"
        yield "written", human_bytes(data["bytes_written"])
    else:
        yield "tensors", f"{len(data['plan']['tensors'])} to be edited"
    yield from _sizes(data.get("measures"))


def _sizes(measures: Document | None) -> Iterator[tuple[str, str]]:
    if measures:
        for label, words in (("parameters", "{:,}"), ("bytes", "")):
            before, after = measures[label]["original"], measures[label]["converted"]
            told = [words.format(n) if words else human_bytes(n) for n in (before, after)]
            change = f" ({(after - before) / before:+.2%})" if before and after != before else ""
            yield {"bytes": "weights"}.get(label, label), f"{told[0]} before, {told[1]} after{change}"


def _note(data: Document) -> Iterator[str]:
    if data.get("measures_error"):
        yield f"not measured layer by layer: {data['measures_error']}"
