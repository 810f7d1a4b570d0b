"""What stands beside the weights in an output folder: the record, the model card, the files that load it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from . import __version__
from .result import Report

if TYPE_CHECKING:
    from .plan import Plan
    from .sources import Source

RECORD_FORMAT = 1


def loading_files(source: Source, plan: Plan, dtype: str) -> dict[str, str | bytes]:
    """The files that make the output load by itself."""
    if source.library != "transformers":
        return {}
    from .loading import huggingface_files

    config = dict(source.config)
    if dtype != "auto":
        config["dtype"] = dtype
        config.pop("torch_dtype", None)
    return huggingface_files(config, plan, source.architecture)


def write_record(folder: Path, source: Source, report: Report, hashes: dict[str, str]) -> None:
    """normconvert.json: all that is needed to load the output, and to make it again."""
    record = {
        "format": RECORD_FORMAT,
        "normconvert": __version__,
        "method": report.method,
        "library": source.library,
        "architecture": source.architecture,
        "source": {"reference": Path(report.source).name, "revision": source.revision, "sha256": hashes},
        "plan": report.plan.to_json(),
        "verification": report.fidelity.to_json() if report.fidelity else None,
    }
    text = json.dumps(record, indent=1, ensure_ascii=False, default=str) + "\n"
    (folder / "normconvert.json").write_text(text, encoding="utf-8")


def write_card(folder: Path, source: Source, report: Report) -> None:
    """README.md: what was done, how to load it, how faithful it is."""
    from .modelcard import model_card
    from .report.words import auto_class, in_words

    existing = source.folder / "README.md" if source.folder else None
    text = model_card(
        report.source,
        report.plan,
        in_words(report.fidelity) if report.fidelity else None,
        library=source.library,
        architecture=source.architecture,
        auto_class=auto_class(folder, source.architecture) or source.architecture,
        source_readme=existing.read_text(encoding="utf-8") if existing and existing.is_file() else None,
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
