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

from pydantic import TypeAdapter, ValidationError

from normconvert.apply.record import loading_files, record_of, write_card
from normconvert.errors import InputError, NormConvertError, first_line
from normconvert.files.user_paths import user_path
from normconvert.option_fields import about, taking
from normconvert.options import DTYPES, Conversion, Options
from normconvert.plan.conversion_plan import Plan
from normconvert.plan.conversion_record import RECORD_FILE, read_whole_record
from normconvert.plan.given_rotations import given_in, read_rotation
from normconvert.result import Clock, Report
from normconvert.verification.folder_comparison import (
    TOOLS,
    Finding,
    compare_data,
    compare_folders,
    list_files,
    same_bytes,
)
from normconvert.verification.recorded_figures import implausible, other_figures
from normconvert.verification.requests import Checking, Verification

if TYPE_CHECKING:
    from normconvert.sources import Source

CARD = "README.md"
JOB_STATE = ".cache/normconvert/job.json"
"""What a recipe keeps beside its output."""
WORDS = frozenset({"notes", "doors", "untraced_doors", "shifted_doors", "shifted_classes"})
"""The parts of a plan that change nothing: what is said of it."""
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
    from normconvert.sources.opening import recorded_choice

    folder = user_path(request.out)
    folder = folder.parent if folder.name == RECORD_FILE else folder
    say = Clock(request.stage)
    record = read_whole_record(folder)
    reference, commit = source_reference(folder, record, request.source, request.revision)
    say("open")
    arch = record["options"].get("arch")
    if arch is not None and not isinstance(arch, str):
        raise InputError(f"{folder}: the arch in its record is {arch!r}, which is no name")
    opened = open_source(
        reference, revision=commit, arch=arch, trust_remote_code=request.trust_remote_code, **recorded_choice(folder)
    )
    say("trace")
    notes: list[str] = []
    findings: list[Finding] = []
    try:
        _recall_rotation(folder, record, request.rotation)
        plan = _plan_again(opened, record)
        report = _report(folder, opened, plan, record)
    except _Unrepeatable as error:
        findings.append(Finding("record", error.key, RECORD_FILE, error.what))
    else:
        say("replay")
        # By the plan that was made here: what the checked folder says is compared with it, and never done.
        with _replayed(folder, opened, plan, record, request.progress) as (again, hashes, problem):
            findings += [*_check_hashes(record, hashes), *problem, *implausible(report.fidelity, report.plan)]
            findings += _compare_record(record_of(opened, report, hashes), record, notes)
            say("compare")
            if not problem:
                write_card(again, opened, report)
                findings += compare_folders(again, folder, request.ignore, {*GIT_FILES, CARD, RECORD_FILE, JOB_STATE})
                if not (folder / CARD).is_file() or not same_bytes(again / CARD, folder / CARD):
                    notes.append(f"{CARD} was edited since the conversion")
        if request.measure and not findings:
            say("verify")
            where = reference if commit is None else f"{reference.partition('@')[0]}@{commit}"
            _compare_figures(report, where, request, findings, notes)
        notes += _passed_over(folder)
    files = list_files(folder)
    return CheckReport(
        str(request.out), str(reference), tuple(findings), tuple(notes), len(files),
        sum(path.stat().st_size for path in files.values()), say.seconds(),
    )  # fmt: skip


def _compare_figures(
    report: Report, reference: str, request: Checking, findings: list[Finding], notes: list[str]
) -> None:
    """Measure the recorded figures again; of a folder in which nothing else is wrong."""
    from normconvert.verification.equivalence import verify_checkpoints

    if report.fidelity is None:
        findings.append(Finding("record", "verification", RECORD_FILE, "is not there: nothing was measured"))
        return
    same = Verification(
        reference, user_path(request.out), level=report.fidelity.level, trust_remote_code=request.trust_remote_code
    )
    found, others = other_figures(verify_checkpoints(same), report.fidelity)
    findings += found
    if others:
        notes.append(f"measured otherwise, as on another machine: {', '.join(others)}")


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


class _Unrepeatable(Exception):
    """A conversion cannot be made again from what its record says: that alone is a finding."""

    def __init__(self, key: str, what: str) -> None:
        super().__init__(what)
        self.key, self.what = key, what


def _options_of(record: dict[str, Any]) -> tuple[Options, dict[str, Any]]:
    """What the record says of how it was converted: options of the plan, dtype and size of the files.

    Raises:
        _Unrepeatable: these are no options of a conversion.
    """
    said = record["options"]
    names = Options.__dataclass_fields__
    try:
        options = Options(**{name: value for name, value in said.items() if name in names})
        options.check()
        given_in(options.rotation)
        dtype, size = said.get("dtype", "auto"), said.get("max_shard_size")
        if dtype not in DTYPES or not (size is None or (type(size) is int and size > 0)):
            raise InputError(f"dtype {dtype!r} and max_shard_size {size!r} are none")
    except (TypeError, InputError) as error:
        raise _Unrepeatable("options", f"cannot be: {error}") from error
    return options, {"dtype": dtype, "max_shard_size": size}


def _recall_rotation(folder: Path, record: dict[str, Any], file: str | None) -> None:
    """Read the matrix again that was rotated by, if it was one of a file.

    Raises:
        _Unrepeatable: the file is another.
        InputError: nothing says where it is, or it cannot be read.
    """
    given = given_in(_options_of(record)[0].rotation)
    if given is None or record["method"] != "rotate":
        return
    if file is None:
        raise InputError(f"{folder}: it was rotated by the matrix of {given.text[:60]}…: say where with --rotation")
    if (found := read_rotation(file)).kind != given.kind:
        raise _Unrepeatable("options.rotation", f"is {given.text}; {found.name} is {found.kind}")


def _plan_again(source: Source, record: dict[str, Any]) -> Plan:
    """The plan that the source leads to, with the recorded options.

    Raises:
        _Unrepeatable: the record's method cannot be done again, or its options are none.
        TraceError: the source cannot be traced.
    """
    from normconvert.rewrites.family_plan import with_family
    from normconvert.rewrites.native import native_plan
    from normconvert.rewrites.planning import planned
    from normconvert.rewrites.registry import REWRITES

    method, options = record["method"], _options_of(record)[0]
    if method not in REWRITES:
        raise _Unrepeatable(
            "method",
            f"is {method!r}: what that learns cannot be made again from the source, so nothing shows that these are "
            "its weights: compare the two models by normconvert verify",
        )
    plan, graph = planned(source.skeleton(), options, method)
    if options.native and method == "rmsnorm":
        plan = native_plan(source, plan, graph)
    return with_family(source, plan, options, whole=graph)


def _compare_record(expected: dict[str, Any], record: dict[str, Any], notes: list[str]) -> Iterator[Finding]:
    """What the record says otherwise than that of the conversion made again; words and versions are notes."""
    # Through JSON, as the record was: tuples are lists there, and keys are strings.
    expected = json.loads(json.dumps(expected, default=str))
    worded = []
    for key, what in compare_data(expected, record):
        part, _, rest = key.partition(".")
        if part in ("versions", "normconvert", "source"):
            continue
        # Made of the recorded figures themselves: none can differ, but there may be others. An older version had fewer.
        if part == "verification" and what.startswith("is missing"):
            continue
        if part == "plan" and (rest.partition(".")[0] in WORDS or rest.endswith(".reason")):
            worded.append(key)
        else:
            yield Finding("plan" if part in ("plan", "modules") else "record", key, RECORD_FILE, what)
    if worded:
        notes.append(f"{RECORD_FILE} words {len(worded)} entries otherwise than this version, such as {worded[0]}")
    there, here = ({"normconvert": one.get("normconvert"), **one["versions"]} for one in (record, expected))
    if there != here:
        # No reason to look less closely: another version may plan otherwise, and so may whoever edits a record.
        names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
        changed = ", ".join(f"{name} {there.get(name)} there, {here.get(name)} here" for name in names)
        notes.append(f"converted with other versions: {changed}")


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
                f"of the source changed since the conversion: sha256 {hashes[name][:12]}…, "
                f"was {recorded[name][:12]}… in {RECORD_FILE}"
            )
            yield Finding("source", name, "", what)


@contextmanager
def _replayed(
    folder: Path, source: Source, plan: Plan, record: dict[str, Any], progress: Callable[[str, int, int], None] | None
) -> Iterator[tuple[Path, dict[str, str], list[Finding]]]:
    """The conversion made again in a temporary folder, the source's hashes, and why it could not be made."""
    from normconvert.apply.checkpoint import write_checkpoint

    size = sum(path.lstat().st_size for path in list_files(folder).values())
    with tempfile.TemporaryDirectory(prefix="normconvert-check-") as temporary:
        free = shutil.disk_usage(temporary).free
        if free < size:
            raise InputError(
                f"{folder}: needs {size} bytes to make the conversion again, {tempfile.gettempdir()} has {free}: "
                "set TMPDIR to a larger disk"
            )
        again, written_as = Path(temporary), _options_of(record)[1]
        try:
            written = write_checkpoint(
                source, plan, again, dtype=_torch_dtype(written_as["dtype"]),
                max_shard_size=written_as["max_shard_size"], progress=progress,
                extra_files=loading_files(source, plan, written_as["dtype"]),
            )  # fmt: skip
        except NormConvertError as error:
            what = f"cannot be replayed: {first_line(error)}"
            yield again, source.hashes(), [Finding("plan", "plan", RECORD_FILE, what)]
        else:
            yield again, written.hashes, []


def _passed_over(folder: Path) -> Iterator[str]:
    for name in TOOLS:
        if (folder / name).exists():
            yield f"{name} was not compared"


def _torch_dtype(name: str) -> Any:
    import torch

    return None if name == "auto" else getattr(torch, name)


def _report(folder: Path, source: Source, plan: Plan, record: dict[str, Any]) -> Report:
    """The report of the conversion made again, with the recorded figures of its verification.

    Raises:
        _Unrepeatable: these are no figures.
    """
    from normconvert.verification.fidelity import Fidelity

    found, fidelity, said = record.get("verification"), None, record["options"]
    if found is not None:
        values = {key: float(value) if value in ("inf", "-inf", "nan") else value for key, value in found.items()}
        try:
            fidelity = TypeAdapter(Fidelity).validate_python(values)
        except ValidationError as error:
            raise _Unrepeatable("verification", f"holds no figures: {error.errors()[0]['msg']}") from error
    named = record["source"]["reference"] if record["source"].get("revision") else source.reference
    options = {name: said.get(name, default) for name, default, known in about(Conversion) if known.recorded}
    return Report(
        named, source.library, source.architecture, plan.method, str(folder), plan, fidelity=fidelity, options=options
    )
