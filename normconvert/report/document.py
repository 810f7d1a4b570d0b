"""The JSON document of a command: what ``--json`` writes, on success and on failure."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from normconvert.result import Report
    from normconvert.verification.fidelity import Fidelity
    from normconvert.verification.record_check import CheckReport


def report_document(command: str, report: Report) -> dict[str, Any]:
    """What a conversion or an inspection found."""
    return {"command": command, **report.to_json()}


def fidelity_document(a: str, b: str, fidelity: Fidelity) -> dict[str, Any]:
    """What ``verify`` found."""
    return {"command": "verify", "original": a, "converted": b, **fidelity.to_json()}


def check_document(report: CheckReport) -> dict[str, Any]:
    """What ``check`` found."""
    return {"command": "check", **report.to_json()}


def error_document(message: str, status: int, error: BaseException | None = None) -> dict[str, Any]:
    """Why a command failed; with the ``report`` (verdicts, figures) if it got that far.

    ``error`` is the first line of the message, which says it all; the others list details that ``report`` holds.
    """
    # A refusal is where the verdicts are wanted most.
    report: Report | None = getattr(error, "report", None)
    return {
        "error": message.splitlines()[0] if message else "",
        "kind": type(error).__name__ if error is not None else "UsageError",
        "exit_status": status,
        **({"report": report.to_json()} if report is not None else {}),
    }


def plain(value: Any) -> Any:
    """``value`` in JSON's own types; numbers that JSON lacks (inf, nan) and everything unknown become strings."""
    if isinstance(value, float):
        # As a string: readers other than Python's stop at NaN.
        return value if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value if value is None or isinstance(value, (str, int)) else str(value)
