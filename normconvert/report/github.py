"""GitHub Actions: annotations (workflow commands on stdout) and the job's summary page."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from normconvert.report.markdown import markdown
from normconvert.verification.folder_comparison import Finding
from normconvert.verification.limits import outcomes

SUMMARY = "GITHUB_STEP_SUMMARY"
"""The environment variable that names the file of the job's summary."""
MOST = 10
"""GitHub shows ten annotations of one kind a step."""


def github(document: dict[str, Any], write: Callable[[str], object]) -> None:
    """Print the annotations and add the summary to the job's page, where there is one.

    Args:
        document: of ``verify`` or ``check``, or of an error.
        write: prints a text.
    """
    write("".join(f"{line}\n" for line in annotation_lines(document)))
    summary = os.environ.get(SUMMARY)
    if summary:
        # Appended: other steps of the job write to the same page.
        with Path(summary).open("a", encoding="utf-8", errors="replace") as file:
            file.write(markdown(document) + "\n")


def annotation_lines(document: dict[str, Any]) -> Iterator[str]:
    """One line for each thing that is wrong, or one that says that nothing is."""
    if "error" in document:
        yield _line("error", "normconvert", str(document["error"]))
        return
    command = document["command"]
    title = f"normconvert {command}"
    if document["passed"]:
        yield _line("notice", title, _good(document))
        return
    if command != "check":
        for reason in document["reasons"][:MOST]:
            yield _line("error", title, reason)
        return
    findings = [Finding(**data) for data in document["findings"]]
    # One annotation is kept for saying how many more there are; GitHub drops the rest without a word.
    shown = findings if len(findings) <= MOST else findings[: MOST - 1]
    for finding in shown:
        file = os.path.join(document["output"], finding.file) if finding.file else None
        yield _line("error", title, finding.sentence, file)
    if len(shown) < len(findings):
        yield _line("error", title, f"and {len(findings) - len(shown)} more findings")


def _good(document: dict[str, Any]) -> str:
    if document["command"] == "check":
        return f"{document['output']} is the conversion of {document['source']}, byte for byte"
    figures = ", ".join(f"{o.figure.name} {o.value}" for o in outcomes(document) if o.found is not None)
    return f"{document['converted']} is faithful to {document['original']}: {figures}"


def _line(level: str, title: str, message: str, file: str | None = None) -> str:
    properties = {"file": file, "title": title} if file else {"title": title}
    words = ",".join(f"{key}={_property(value or '')}" for key, value in properties.items())
    return f"::{level} {words}::{_data(message)}"


def _data(text: str) -> str:
    """Escaped as the runner unescapes it: a message cannot end its command or begin another."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    # Within a property these two end it.
    return _data(text).replace(":", "%3A").replace(",", "%2C")
