"""What stands beside the weights in an output folder: the record, the model card, the files that load it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normconvert import __version__
from normconvert.files.weight_files import leads_inside
from normconvert.result import Report

if TYPE_CHECKING:
    from normconvert.plan.conversion_plan import Plan
    from normconvert.sources import Source

RECORD_FORMAT = 1


def loading_files(source: Source, plan: Plan, dtype: str) -> dict[str, str | bytes]:
    """The files that make the output load by itself."""
    if source.library != "transformers" or plan.native:
        return {}
    from normconvert.sources.converted import huggingface_files
    from normconvert.sources.transformers_models import own_class

    config = dict(source.config)
    if dtype != "auto":
        config["dtype"] = dtype
        # The same under its older name would now say something else.
        config.pop("torch_dtype", None)
    plan = replace(plan, modules=all_modules(source, plan))
    return huggingface_files(config, plan, source.architecture, own_code=own_class(source) is not None)


def all_modules(source: Source, plan: Plan) -> list[dict[str, Any]]:
    """The module edits of the output: those that the source needs already, then the plan's."""
    return [*source.modules, *plan.modules]


def write_record(folder: Path, source: Source, report: Report, hashes: dict[str, str]) -> None:
    """normconvert.json: all that is needed to load the output, and to make it again."""
    put_record(folder, record_of(source, report, hashes))


def put_record(folder: Path, record: dict[str, Any]) -> None:
    """Write a record into a folder, as all of them are written."""
    text = json.dumps(record, indent=1, ensure_ascii=False, default=str) + "\n"
    (folder / "normconvert.json").write_text(text, encoding="utf-8")


def record_of(source: Source, report: Report, hashes: dict[str, str]) -> dict[str, Any]:
    """What :func:`write_record` writes."""
    return {
        "format": RECORD_FORMAT,
        "normconvert": __version__,
        "method": report.method,
        "library": source.library,
        "architecture": report.plan.native or source.architecture,
        "source": {"reference": public_reference(report.source, source), "revision": source.revision, "sha256": hashes},
        "options": report.options,
        "versions": versions(source.library),
        "plan": report.plan.to_json(),
        # The plan holds this conversion's edits only; what is converted a second time needs the first ones, too.
        **({"modules": all_modules(source, report.plan)} if source.modules else {}),
        "verification": report.fidelity.to_json() if report.fidelity else None,
    }


def public_reference(reference: str, source: Source) -> str:
    """What the record calls the source: a hub id as it is (its commit stands beside it), of a path its name only."""
    return reference.partition("@")[0] if source.revision is not None else Path(reference).absolute().name


def versions(library: str) -> dict[str, str]:
    """The libraries that a plan and the bytes written depend on."""
    return {name: str(import_module(name).__version__) for name in ("torch", library)}


def _auto_classes(source: Source) -> list[str]:
    """The Auto classes that build the source's architecture; of timm's, the one that does the same."""
    if source.library == "timm":
        return ["AutoModelForImageClassification"] if source.config.get("num_classes") else []
    from normconvert.sources.families import family

    return list(family(str(source.config.get("model_type"))).get(source.architecture, ()))


def write_card(folder: Path, source: Source, report: Report) -> None:
    """README.md: what was done, how to load it, how faithful it is."""
    from normconvert.wording.words import in_words, with_changes

    fidelity, plan = report.fidelity, report.plan
    if fidelity is not None:
        plan = replace(plan, notes=[with_changes(note, fidelity) for note in plan.notes])
    name = str(report.options.get("name") or Path(report.out or folder).absolute().name)
    put_card(folder, source, report.source, plan, in_words(fidelity) if fidelity else None, name)


def put_card(
    folder: Path, source: Source, reference: str, plan: Plan, figures: Mapping[str, Any] | None, name: str
) -> None:
    """Write the model card of an output.

    Args:
        folder: the output, complete but for the card.
        source: what was converted; its own card is continued.
        reference: as the user named it.
        plan: of the output.
        figures: name -> what was measured; None: nothing was.
        name: of the output, in the lines that load it.
    """
    from normconvert.apply.card_metadata import TASKS
    from normconvert.apply.model_card import auto_class, model_card, remote_code
    from normconvert.plan.conversion_record import fit_alone

    existing = source.folder / "README.md" if source.folder else None
    # The same that is copied: a link could have any file of this machine published.
    if existing and not (existing.is_file() and leads_inside(existing.parent, existing)):
        existing = None
    text = model_card(
        reference,
        plan,
        figures,
        library=source.library,
        architecture=source.architecture,
        auto_class=auto_class(folder, source.architecture) or source.architecture,
        code=remote_code(folder),
        source_readme=existing.read_text(encoding="utf-8", errors="replace") if existing else None,
        revision=source.revision,
        name=name,
        alone=fit_alone(all_modules(source, plan)),
        task=next((TASKS[auto] for auto in _auto_classes(source) if auto in TASKS), None),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
