"""Is a converted checkpoint still what its record says? The conversion is made again and compared byte for byte.

Three questions, each with findings of its own: are the source's files those that were converted (sha256); is the plan
the one that their architecture and the recorded options lead to; does the plan, replayed on the source, give these very
files? Nothing in the checked folder is trusted for an answer about itself.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normconvert import __version__
from normconvert.apply.output_folder import list_files
from normconvert.apply.record import RECORD_FORMAT, loading_files, versions, write_card
from normconvert.errors import InputError, NormConvertError
from normconvert.files.digest import sha256
from normconvert.options import Options, taking
from normconvert.plan.conversion_plan import Plan
from normconvert.plan.conversion_record import RECORD_FILE, NotConverted
from normconvert.result import Clock, Report
from normconvert.verification.folder_comparison import Finding, compare_data, compare_folders, same_bytes
from normconvert.verification.requests import Checking

if TYPE_CHECKING:
    from normconvert.sources import Source

CARD = "README.md"
EFFECTIVE = ("tensors", "aliases", "modules", "removed", "config")
"""The parts of a plan that change a checkpoint; the others are words about it."""
GIT_FILES = (".gitattributes", ".gitignore")
"""What version control and the hub put beside a checkpoint."""


@dataclass(frozen=True)
class CheckReport:
    """What :func:`check` found.

    Attributes:
        output: the folder that was checked.
        source: what its conversion was made again from.
        findings: everything that is not as it should be.
        notes: sentences for the user that fail nothing.
        files: how many files were compared.
        bytes: their size.
        seconds: stage -> seconds it took.
    """

    output: str
    source: str
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()
    files: int = 0
    bytes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    def to_json(self) -> dict[str, Any]:
        """The report as JSON-ready data."""
        return {**asdict(self), "findings": [asdict(f) for f in self.findings], "passed": self.passed}


@taking(Checking)
def check(request: Checking) -> CheckReport:
    """Check a converted checkpoint against its recorded source and plan.

    ``source`` may be left out where the record says where to find it: for the hub and for embedded models.

    Returns:
        The findings; :attr:`CheckReport.passed` if there are none. The model card is compared, too, but only noted:
        it is there to be edited.

    Raises:
        InputError: ``out`` has no record, the source cannot be opened, or there is no room for the replay in the
            temporary folder (``TMPDIR``).
        TraceError: the source cannot be traced any more.
    """
    from normconvert.sources import open_source

    folder = Path(request.out).expanduser()
    folder = folder.parent if folder.name == RECORD_FILE else folder
    say = Clock(request.stage)
    record = read_conversion(folder)
    plan = Plan.from_json(record["plan"])
    reference, commit = source_reference(folder, record, request.source, request.revision)
    say("open")
    arch = record["options"].get("arch")
    opened = open_source(reference, revision=commit, arch=arch, trust_remote_code=request.trust_remote_code)
    say("trace")
    findings, notes = _check_plan(opened, record)
    say("replay")
    with _replayed(folder, opened, plan, record, request.progress) as (again, hashes, problem):
        findings += [*_check_hashes(record, hashes), *problem]
        say("compare")
        if not problem:
            skip = [*GIT_FILES, CARD, RECORD_FILE, *request.ignore]
            findings += list(compare_folders(again, folder, skip))
            if not (folder / CARD).is_file() or not same_bytes(again / CARD, folder / CARD):
                notes.append(f"{CARD} was edited since the conversion")
    files = list_files(folder)
    return CheckReport(
        str(request.out), str(reference), tuple(findings), tuple(notes), len(files),
        sum(path.stat().st_size for path in files.values()), say.seconds(),
    )  # fmt: skip


def read_conversion(folder: Path) -> dict[str, Any]:
    """The whole record of a conversion.

    Raises:
        InputError: there is none, or one that this version cannot read.
    """
    file = folder / RECORD_FILE
    if not file.is_file():
        what = "no such folder" if not folder.is_dir() else f"not converted by normconvert (no {RECORD_FILE})"
        raise NotConverted(f"{folder}: {what}: nothing to check")
    try:
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if record["format"] != RECORD_FORMAT:
            raise InputError(
                f"{file}: format {record['format']!r}, expected {RECORD_FORMAT}: use the normconvert that wrote it"
            )
        missing = {"source", "options", "versions", "plan", "method", "library", "architecture"} - set(record)
        if missing:
            raise KeyError(min(missing))
        Plan.from_json(record["plan"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{file}: not a conversion record ({error!r}): convert again") from error
    return record


def source_reference(
    folder: Path, record: dict[str, Any], source: str | Path | None, revision: str | None
) -> tuple[str, str | None]:
    """The source to open, and its revision on the hub: ``source``, or what the record says.

    Raises:
        InputError: the record names a local source, whose place it does not know.
    """
    if source is not None:
        return str(source), revision
    named, commit = str(record["source"].get("reference")), record["source"].get("revision")
    if commit is None and not named.startswith("demo:"):
        raise InputError(
            f"{folder}: its record names the local source {named!r} without its place: say where with --source"
        )
    return named, revision or commit


def _check_plan(source: Source, record: dict[str, Any]) -> tuple[list[Finding], list[str]]:
    """Findings and notes from planning again, with the recorded options."""
    from normconvert.rewrites.planning import plan_model
    from normconvert.rewrites.registry import REWRITES

    findings = [
        Finding("record", key, RECORD_FILE, f"is {record[key]!r}, the source's is {value!r}")
        for key, value in (("library", source.library), ("architecture", source.architecture))
        if record[key] != value
    ]
    method = record["method"]
    if method != record["plan"]["method"]:
        findings.append(
            Finding("record", "method", RECORD_FILE, f"is {method!r}, its plan's {record['plan']['method']!r}")
        )
    if method not in REWRITES:
        return findings, [f"what {method} learns cannot be planned again: the plan is taken from the record"]
    names = Options.__dataclass_fields__
    try:
        options = Options(**{name: value for name, value in record["options"].items() if name in names})
        options.check()
    except (TypeError, InputError) as error:
        return [*findings, Finding("record", "options", RECORD_FILE, f"cannot be: {error}")], []
    # Through JSON, as the record was: tuples are lists there, and keys are strings.
    again = json.loads(json.dumps(plan_model(source.skeleton(), options, method).to_json(), default=str))
    differences = [
        Finding("plan", f"plan.{key}", RECORD_FILE, what)
        for part in EFFECTIVE
        for key, what in compare_data(again[part], record["plan"].get(part), part)
    ]
    others = _other_versions(record)
    # Other versions may plan better. The recorded plan is still held against the files, byte for byte.
    if differences and others:
        return findings, [f"this plan is not the one that would be made here ({others})"]
    return findings + differences, [f"converted with other versions: {others}"] if others else []


def _other_versions(record: dict[str, Any]) -> str:
    """``torch 2.9 there, 2.15 here``, for all that differ."""
    there = {"normconvert": record.get("normconvert"), **record["versions"]}
    here = {"normconvert": __version__, **versions(record["library"])}
    return ", ".join(
        f"{name} {there[name]} there, {here.get(name)} here" for name in there if there[name] != here.get(name)
    )


def _check_hashes(record: dict[str, Any], hashes: dict[str, str]) -> Iterator[Finding]:
    """The source's files against what was recorded of them."""
    recorded: dict[str, str] = record["source"].get("sha256") or {}
    for name in dict.fromkeys([*recorded, *hashes]):
        if name not in hashes:
            yield Finding("source", name, "", "is no file of the source any more")
        elif name not in recorded:
            yield Finding("source", name, "", "is a file of the source that was not there when it was converted")
        elif recorded[name] != hashes[name]:
            what = (
                f"of the source changed since the conversion: sha256 {hashes[name][:12]}…, was {recorded[name][:12]}…"
            )
            yield Finding("source", name, "", what)


@contextmanager
def _replayed(
    folder: Path,
    source: Source,
    plan: Plan,
    record: dict[str, Any],
    progress: Callable[[str, int, int], None] | None,
) -> Iterator[tuple[Path, dict[str, str], list[Finding]]]:
    """The conversion made again in a temporary folder, the source's hashes, and why it could not be made."""
    from normconvert.apply.checkpoint import write_checkpoint

    size = sum(path.stat().st_size for path in list_files(folder).values())
    with tempfile.TemporaryDirectory(prefix="normconvert-check-") as temporary:
        free = shutil.disk_usage(temporary).free
        if free < size:
            raise InputError(
                f"{folder}: needs {size} bytes to make the conversion again, {tempfile.gettempdir()} has {free}: "
                "set TMPDIR to a larger disk"
            )
        again = Path(temporary)
        dtype = record["options"].get("dtype", "auto")
        try:
            written = write_checkpoint(
                source, plan, again, dtype=_torch_dtype(dtype), max_shard_size=record["options"].get("max_shard_size"),
                progress=progress, extra_files=loading_files(source, plan, dtype),
            )  # fmt: skip
            _write_card(again, source, plan, record)
        except (NormConvertError, KeyError, TypeError, ValueError) as error:
            reason = str(error).splitlines()[0] if isinstance(error, NormConvertError) else repr(error)
            yield again, _hashes(source), [Finding("plan", "plan", RECORD_FILE, f"cannot be replayed: {reason}")]
        else:
            yield again, written.hashes, []


def _hashes(source: Source) -> dict[str, str]:
    """The source's hashes where no conversion reads it."""
    config = source.folder / "config.json" if source.folder is not None else None
    files = [*source.files, *([config] if config is not None and config.is_file() else [])]
    return {path.name: sha256(path) for path in files}


def _torch_dtype(name: str) -> Any:
    import torch

    return None if name == "auto" else getattr(torch, name)


def _write_card(folder: Path, source: Source, plan: Plan, record: dict[str, Any]) -> None:
    from normconvert.verification.fidelity import Fidelity

    found = record.get("verification")
    named = record["source"]["reference"] if record["source"].get("revision") else source.reference
    report = Report(
        named, source.library, source.architecture, plan.method, str(folder), plan,
        fidelity=Fidelity(**{key: _number(value) for key, value in found.items()}) if found else None,
    )  # fmt: skip
    write_card(folder, source, report)


def _number(value: Any) -> Any:
    return float(value) if value in ("inf", "-inf", "nan") else value
