"""JUnit XML, which every CI system shows: one case for each figure, or for each part of a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

from normconvert.verification.limits import outcomes

NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that XML 1.0 cannot hold, not even escaped."""

PARTS = {
    "record": "the record fits the source",
    "source": "the source is the one that was converted",
    "plan": "the plan is the one that the source leads to",
    "weights": "the weights are those that the plan gives",
    "config": "config.json is as the conversion writes it",
    "files": "the other files are as the conversion writes them",
}
"""What ``check`` looks at -> the case's name."""


@dataclass(frozen=True)
class Case:
    """One test case: passed unless it says otherwise; at most one of ``failure``, ``error`` and ``skipped``."""

    name: str
    failure: str | None = None
    error: str | None = None
    skipped: str | None = None
    output: str | None = None


def junit(document: dict[str, Any]) -> str:
    """The document of ``verify`` or ``check``, or of an error, as JUnit XML.

    The text is the same for the same document: it holds no time stamp.
    """
    command = str(document.get("command", "run"))
    cases = list(_cases(document))
    counts = {
        "tests": len(cases),
        "failures": sum(case.failure is not None for case in cases),
        "errors": sum(case.error is not None for case in cases),
        "skipped": sum(case.skipped is not None for case in cases),
    }
    attributes = {"name": f"normconvert {command}", **{key: str(n) for key, n in counts.items()}}
    root = ElementTree.Element("testsuites", attributes)
    suite = ElementTree.SubElement(root, "testsuite", attributes)
    properties = [(key, document[key]) for key in ("original", "converted", "output", "source") if key in document]
    if properties:
        parent = ElementTree.SubElement(suite, "properties")
        for key, value in properties:
            ElementTree.SubElement(parent, "property", {"name": key, "value": _clean(value)})
    for case in cases:
        _add(suite, f"normconvert.{command}", case)
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _add(suite: ElementTree.Element, group: str, case: Case) -> None:
    element = ElementTree.SubElement(suite, "testcase", {"classname": group, "name": _clean(case.name)})
    for tag, text in (("failure", case.failure), ("error", case.error), ("skipped", case.skipped)):
        if text is not None:
            ElementTree.SubElement(element, tag, {"message": _clean(text.splitlines()[0])}).text = _clean(text)
    if case.output is not None:
        ElementTree.SubElement(element, "system-out").text = _clean(case.output)


def _cases(document: dict[str, Any]) -> Iterator[Case]:
    if "error" in document:
        yield Case("normconvert runs", error=str(document["error"]))
    elif document["command"] == "check":
        yield from _check_cases(document)
    else:
        yield from _figure_cases(document)


def _figure_cases(document: dict[str, Any]) -> Iterator[Case]:
    for outcome in outcomes(document):
        name = f"{outcome.figure.name}: {outcome.figure.words}"
        if outcome.passed is False:
            yield Case(name, failure=outcome.sentence)
        # Neither passed nor failed: a figure that a model does not have must not look like one that was checked.
        elif outcome.found is None:
            yield Case(name, skipped="not measured for this model")
        else:
            limit = outcome.bound or "no limit"
            yield Case(name, output=f"{outcome.value} ({limit})")
    # No figure covers what did not run.
    broken = [reason for reason in document["reasons"] if "cannot run probe" in reason]
    yield Case("probes: the converted model runs what the original runs", failure="\n".join(broken) or None)


def _check_cases(document: dict[str, Any]) -> Iterator[Case]:
    from normconvert.verification.folder_comparison import Finding

    for part, name in PARTS.items():
        findings = [Finding(**data) for data in document["findings"] if data["part"] == part]
        yield Case(f"{part}: {name}", failure="\n".join(f.sentence for f in findings) or None)


def _clean(value: Any) -> str:
    # Otherwise one odd character in a name makes the whole file unreadable.
    return NOT_XML.sub("�", str(value))
