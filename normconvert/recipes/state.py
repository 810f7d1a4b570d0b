"""What an output says about the job that made it, and what that means for the job now: skip, convert, redo, refuse.

The state lies in the output, in a folder that conversions and checks pass over like every cache. It holds what may
change where the record of the conversion (``normconvert.json``) may not: the files' times, by which they are known
again without being read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from normconvert import __version__
from normconvert.plan.conversion_record import RECORD_FILE
from normconvert.recipes.fingerprint import Mark, compare
from normconvert.recipes.job import Job
from normconvert.recipes.storage import Store, is_url

STATE = ".cache/normconvert/job.json"
FORMAT = 1
UP_TO_DATE = "up to date"
EDITABLE = frozenset({"README.md"})
"""Files of an output that a user may change: the model card."""


@dataclass(frozen=True)
class State:
    """What is kept of a job that is done.

    Attributes:
        settings: :attr:`Job.settings`.
        source: its last name, so that no path of this machine is written down.
        revision: commit on the hub.
        source_files: the source's files as they were; None on the hub, where the commit says it all.
        output_files: the output's files as they were written.
        verified: whether the result was checked.
        figures: of the verification.
        run: the batch that made it.
        uploaded: the repository on the hub that has it.
        normconvert: the version that made it.
        stored: for an object store: relative name -> (bytes, version).
    """

    settings: dict[str, Any]
    source: str
    revision: str | None
    source_files: Mark | None
    output_files: Mark
    verified: bool
    figures: dict[str, Any] = field(default_factory=dict)
    norms: tuple[int, int] | None = None
    run: str = ""
    uploaded: str | None = None
    normconvert: str = __version__
    stored: dict[str, tuple[int, str]] = field(default_factory=dict)

    def dump(self) -> bytes:
        """The file's content."""
        data = {
            **vars(self),
            "format": FORMAT,
            "source_files": self.source_files.to_json() if self.source_files else None,
            "output_files": self.output_files.to_json(),
        }
        return (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode()

    @classmethod
    def parse(cls, content: bytes) -> State | None:
        """The inverse of :meth:`dump`; None for anything that this version did not write."""
        try:
            data = json.loads(content)
            if data.pop("format") != FORMAT:
                return None
            data["source_files"] = Mark.from_json(data["source_files"]) if data["source_files"] else None
            data["output_files"] = Mark.from_json(data["output_files"])
            data["norms"] = tuple(data["norms"]) if data["norms"] else None
            data["stored"] = {name: (size, version) for name, (size, version) in data["stored"].items()}
            return cls(**data)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None


@dataclass(frozen=True)
class Decision:
    """What is to be done with a job.

    Attributes:
        action: ``convert``; ``redo`` what is there but out of date; ``skip`` what is there and right; ``refuse`` what
            would destroy something; ``upload`` what is there and right but not on the hub.
        why: a reason for all but ``convert``.
        state: of the output, for what is skipped.
    """

    action: Literal["convert", "redo", "skip", "refuse", "upload"]
    why: str = ""
    state: State | None = None


def source_name(job: Job) -> str:
    """What the state calls a source: a hub id or a demo as it is, of a path the last part."""
    return Path(job.source).name if os.path.isabs(job.source) else job.source


def source_path(job: Job) -> Path | None:
    """The folder or file of a source; None on the hub."""
    if job.source.startswith("demo:"):
        from normconvert.files.embedded import demo_folder

        return demo_folder(job.source.removeprefix("demo:"))
    return Path(job.source) if os.path.isabs(job.source) else None


def decide(job: Job) -> Decision:
    """What to do with a job, from what its output and its source say now. Reads files only where it has to.

    Raises:
        InputError: an object store cannot be reached.
    """
    decision = _decide_stored(job) if is_url(job.output) else _decide_local(job, Path(job.output))
    # Only what is right is uploaded: everything else is made again first.
    if decision.action == "skip" and job.upload and decision.state and decision.state.uploaded != job.upload.repo:
        return replace(decision, action="upload", why=f"not uploaded to {job.upload.repo} yet")
    return decision


def _decide_local(job: Job, out: Path) -> Decision:
    if not out.exists():
        return Decision("convert")
    if not out.is_dir():
        return Decision("refuse", "the output exists and is a file")
    if not any(out.iterdir()):
        return Decision("convert")
    # Before --force is asked: even that replaces nothing but conversions.
    if not (out / RECORD_FILE).is_file():
        return Decision("refuse", "the output exists and was not made by normconvert: remove it or name another one")
    if job.redo:
        return Decision("redo", "forced")
    state = read_state(out)
    if state is None:
        return Decision("refuse", "the output exists and was not made by a recipe: --force replaces it")
    found = compare(state.output_files, out)
    # What is missing can be made again; what was changed or added would be lost.
    touched = replace(found, missing=()).words(EDITABLE)
    stale, source_files = out_of_date(job, state)
    # An edited model card alone is no reason to do anything, but is not to be written over either.
    if touched or (stale and found.words()):
        return Decision("refuse", f"the output was edited ({touched or found.words()}): --force replaces it")
    if found.missing:
        return Decision("redo", f"{found.missing[0]} is missing")
    if stale:
        return Decision("redo", stale)
    fresh = replace(state, output_files=found.fresh or state.output_files, source_files=source_files)
    if fresh != state:
        with suppress(OSError):  # only saves time: where the output is read-only, files are read again the next time
            write_state(out, fresh)
    return Decision("skip", UP_TO_DATE, fresh)


def _decide_stored(job: Job) -> Decision:
    store = Store(job.output)
    found = store.files()
    if not found:
        return Decision("convert")
    # As with a folder. The record is uploaded first, so that an upload that was cut off is known as ours.
    if RECORD_FILE not in found:
        return Decision("refuse", "the output exists and was not made by normconvert: remove it or name another one")
    if job.redo:
        return Decision("redo", "forced")
    content = store.read(STATE)
    if content is None:
        return Decision("redo", "it is not complete")
    state = State.parse(content)
    if state is None:
        return Decision("redo", "it was made by another version")
    for name, (size, version) in state.stored.items():
        if name not in found:
            return Decision("redo", f"{name} is missing")
        # By what the store says: to hash the files they would have to be downloaded.
        if found[name][0] != size or (version and found[name][1] != version):
            return Decision("refuse", f"the output was edited ({name} changed): --force replaces it")
    stale, _ = out_of_date(job, state)
    return Decision("redo", stale) if stale else Decision("skip", UP_TO_DATE, state)


def out_of_date(job: Job, state: State) -> tuple[str, Mark | None]:
    """Why a finished output is not what the job asks for, empty if it is; and the source's files under new times."""
    stale = _other_settings(job, state)
    path = source_path(job)
    if stale or path is None:
        # Offline, say: a branch may have moved, and then what is there would be wrong without anyone's noticing.
        if not stale and job.revision is None:
            stale = "the source's commit is not known"
        elif not stale and state.revision != job.revision:
            stale = f"the source is at commit {str(job.revision)[:8]} now"
        return stale, state.source_files
    if state.source_files is None:
        return "the source's files were not recorded", None
    found = compare(state.source_files, path)
    return "" if found.same else f"of the source, {found.words()}", found.fresh or state.source_files


def _other_settings(job: Job, state: State) -> str:
    """What was asked for otherwise when the output was made."""
    # Another version may write other bytes.
    if state.normconvert != __version__:
        return f"made by normconvert {state.normconvert}, this is {__version__}"
    for name in dict.fromkeys([*job.settings, *state.settings]):
        was, now = state.settings.get(name), job.settings.get(name)
        if was != now:
            return f"{name} was {_value(was)}, is {_value(now)}"
    if state.source != source_name(job):
        return f"made from {state.source}"
    if job.verify and not state.verified:
        return "it was not verified"
    return broken_limit(state.figures, job.limits)


def broken_limit(figures: Mapping[str, Any], limits: Mapping[str, float]) -> str:
    """The first limit that recorded figures do not keep; empty if they keep all."""
    from normconvert.verification.limits import outcomes

    if not limits:
        return ""
    for outcome in outcomes({"tolerance": "nan", "rounding_tolerance": "nan", **figures, "limits": dict(limits)}):
        if outcome.figure.name in limits and outcome.passed is False:
            return outcome.sentence
    return ""


def _value(value: Any) -> str:
    return "not set" if value is None else str(value)


def read_state(out: Path) -> State | None:
    """The state in an output folder; None if there is none."""
    try:
        return State.parse((out / STATE).read_bytes())
    except OSError:
        return None


def write_state(out: Path, state: State) -> None:
    """Put the state into a folder, complete or not at all."""
    path = out / STATE
    path.parent.mkdir(parents=True, exist_ok=True)
    # By process: two runs that look at one output must not write into one file.
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_bytes(state.dump())
    os.replace(partial, path)
