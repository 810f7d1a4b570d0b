"""A Markdown summary for pull requests and job pages."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from normconvert.report.junit import PARTS
from normconvert.verification.folder_comparison import Finding
from normconvert.verification.limits import outcomes
from normconvert.wording.grouping import Row, collapse

MOST = 30
"""Findings that are listed; a pull request is no place for more."""


def markdown(document: dict[str, Any]) -> str:
    """The document of ``verify`` or ``check``, or of an error, in GitHub's Markdown."""
    if "error" in document:
        lines = ["### ❌ normconvert could not run", "", code(document["error"])]
    elif document["command"] == "check":
        lines = list(_check(document))
    else:
        lines = list(_verify(document))
    return "\n".join(lines) + "\n"


def _verify(document: dict[str, Any]) -> Iterator[str]:
    sign, word = ("✅", "faithful") if document["passed"] else ("❌", "not faithful")
    yield f"### {sign} {word}: {code(document['converted'])} against {code(document['original'])}"
    yield ""
    rows = [
        (code(o.figure.name), o.figure.words, o.value, o.bound or "–", {None: "", True: "✅", False: "❌"}[o.passed])
        for o in outcomes(document)
    ]
    yield from table(("figure", "", "found", "limit", ""), rows)
    yield from ("", f"Verified: {text(document.get('level', 'standard'))}.")
    yield from (f"- {text(remark)}" for remark in document.get("remarks", ()))
    if document["reasons"]:
        yield ""
        yield from (f"- {text(reason)}" for reason in document["reasons"])
    probes = [row for row in document["probes"] if "skipped" not in row]
    if probes:
        yield from (
            "",
            f"<details><summary>{len(probes)} outputs of {len({p['probe'] for p in probes})} probes</summary>",
            "",
        )
        keys = ("algebra", "original_error", "converted_error")
        cells = [(code(p["probe"]), code(p["output"]), *(_number(p.get(key)) for key in keys)) for p in probes]
        yield from table(("probe", "output", "algebra", "error of the original", "error of the converted"), cells)
        yield from ("", "</details>")


def _check(document: dict[str, Any]) -> Iterator[str]:
    findings = [Finding(**data) for data in document["findings"]]
    sign, word = ("✅", "is its conversion") if not findings else ("❌", "is not its conversion any more")
    yield f"### {sign} {code(document['output'])} {word}"
    yield ""
    counts = {part: sum(f.part == part for f in findings) for part in PARTS}
    rows = [(name, "✅" if not counts[part] else f"❌ {counts[part]}") for part, name in PARTS.items()]
    yield from table((f"made again from {code(document['source'])}", ""), rows)
    if findings:
        yield ""
        groups = [(f.subject, f.what, 1) for f in findings]
        if len(groups) > MOST:
            # Only where they are too many: single names are easier to act on.
            alike = collapse(Row(f.name, f.what, f.file) for f in findings)
            groups = [(group.name, group.text, group.count) for group in alike]
        for name, what, count in groups[:MOST]:
            yield f"- {code(name)} {text(what)}" + (f" (×{count})" if count > 1 else "")
        if len(groups) > MOST:
            yield f"- and {len(groups) - MOST} more"
    for note in document["notes"]:
        yield from ("", f"_{text(note)}_")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """A table; cells are Markdown already."""
    yield f"| {' | '.join(head)} |"
    yield "| " + " | ".join("---" for _ in head) + " |"
    for row in rows:
        # A bar ends the cell even inside of code.
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"


def code(value: Any) -> str:
    """Any text as code: no mark-up, mention or link of it comes to life."""
    # On one line: a line break in a name could begin a heading or a list.
    line = " ".join(str(value).split()) or " "
    # Longer than any run inside, which would close it.
    fence = "`" * (max((len(run) for run in re.findall("`+", line)), default=0) + 1)
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def text(value: Any) -> str:
    """A sentence of ours that may name what is not ours: backticks stay code, the rest of the mark-up does not work."""
    parts = re.split(r"(`[^`]*`)", " ".join(str(value).split()))
    return "".join(part if re.fullmatch("`[^`]*`", part) else _plain(part) for part in parts)


def _plain(part: str) -> str:
    escaped = re.sub(r"([\\`*_\[\]#~!])", r"\\\1", html.escape(part, quote=False))
    return escaped.replace("@", "@\u2060").replace("://", ":\u2060//")  # a word joiner: no mention, no link


def _number(value: Any) -> str:
    return "–" if value is None else f"{float(value):.2g}"
