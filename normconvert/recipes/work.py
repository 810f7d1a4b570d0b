"""One job, done wherever it runs: claim the output, convert, hold the result against the limits, publish, upload."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normconvert.apply.output_folder import check_output
from normconvert.apply.output_folder import replace as put_in_place
from normconvert.errors import InputError, NormConvertError, as_bug
from normconvert.plan.conversion_record import RECORD_FILE
from normconvert.recipes.claim import NEW, claim
from normconvert.recipes.fingerprint import stats, take
from normconvert.recipes.job import Job, Result
from normconvert.recipes.state import STATE, State, decide, read_state, source_name, source_path, write_state
from normconvert.recipes.storage import Store, is_url
from normconvert.sources import hub
from normconvert.wording.steps import Step

if TYPE_CHECKING:
    from normconvert.result import Report

Say = Callable[[str, dict[str, Any]], None]
"""Called with the kind and the data of an :class:`normconvert.recipes.job.Event`."""
EVERY = 0.2
"""Seconds between two words about progress."""
FIGURES = ("algebra", "rounding", "top1", "kl", "loss_difference", "mean_over_rms")


def perform(job: Job, say: Say, place: str = "", attempt: int = 1) -> Result:
    """Do a job; whatever goes wrong with it is a result, too.

    Args:
        job: what to do.
        say: hears of its stages and its progress.
        place: what runs it, for the result.
        attempt: how often it has been started, this time included.
    """
    start = time.perf_counter()
    try:
        result = _perform(job, say)
    except NormConvertError as error:
        result = Result("failed", error.exit_status, str(error), type(error).__name__)
    except (OSError, MemoryError) as error:
        message = " ".join(str(error).split()) or "out of memory"
        result = Result("failed", InputError.exit_status, message, type(error).__name__)
    except Exception as error:
        result = Result("failed", InputError.exit_status, as_bug(error), type(error).__name__)
    return replace(result, seconds=time.perf_counter() - start, place=place, attempts=attempt)


def _perform(job: Job, say: Say) -> Result:
    if is_url(job.output):
        return _into_store(job, say)
    out = Path(job.output)
    with claim(out) as folder:
        # Under the claim: another process may have made it while this one waited.
        done = _done_before(job)
        if done is None:
            report, state = _convert(job, folder / NEW, say)
            # Before it is published: an output without its state would count as somebody else's.
            write_state(folder / NEW, state)
            put_in_place(folder / NEW, out.resolve())
            done = _result(report)
    # Without the claim: an upload takes long, and the output is complete.
    return _upload(job, out, done, say)


def _into_store(job: Job, say: Say) -> Result:
    """The output is made in a temporary folder of this machine and copied to its place."""
    with tempfile.TemporaryDirectory(prefix="normconvert-") as folder:
        done = _done_before(job)
        if done is not None:
            if job.upload:
                raise InputError(f"{job.output}: is complete but not uploaded to {job.upload.repo}: --force does both")
            return done
        made = Path(folder) / NEW
        report, state = _convert(job, made, say)
        say("stage", {"name": "copy"})
        store = Store(job.output)
        store.put(made, first=RECORD_FILE, last=STATE)
        done = _upload(job, made, _result(report), say)
        # Last: it is what says that all the rest is there.
        store.write(STATE, replace(state, stored=store.files(), uploaded=done.uploaded).dump())
        return done


def _done_before(job: Job) -> Result | None:
    """The result, if an earlier attempt of this very batch, or another batch, has made the output in the meantime."""
    # As if nothing were forced: a second attempt must find what the first one made.
    decision = decide(replace(job, redo=False, upload=None))
    state = decision.state
    ours = state is not None and state.run == job.run != ""
    if state is not None and (ours or not job.redo):
        done = Result("converted") if ours else Result("skipped", message=decision.why)
        return replace(done, norms=state.norms, figures=state.figures)
    # Once more with --force: what may not be replaced is refused under it as well.
    decision = decide(job) if job.redo else decision
    if decision.action == "refuse":
        raise InputError(f"{job.output}: {decision.why}")
    return None


def _convert(job: Job, made: Path, say: Say) -> tuple[Report, State]:
    """Make the output in a folder that nobody sees yet.

    Raises:
        NormConvertError: as :func:`normconvert.convert`; or the source changed meanwhile.
    """
    path = source_path(job)
    if path is not None and not is_url(job.output):
        # convert() sees the claimed folder only, not where it will be renamed to.
        check_output(Path(job.output), path, overwrite=True)
    # Before the first byte is read: a source that changes meanwhile must not be taken for the one that was converted.
    seen, before = time.time_ns(), stats(path) if path is not None else {}
    from normconvert.api import convert

    with _told(say) as (stage, progress):
        report = convert(
            job.source, made, job.method, **job.options, revision=job.revision, arch=job.arch, dtype=job.dtype,
            variant=job.files, weights=job.weights,
            device=job.device, max_shard_size=job.max_shard_size, verify=job.verify, require_all=job.require_all,
            trust_remote_code=job.trust_remote_code, limits=job.limits, progress=progress, stage=stage,
            name=job.upload.repo if job.upload else job.output.rstrip("/").rpartition("/")[2],
        )  # fmt: skip
    source_files = None
    if path is None:
        hub.remember(job.source, job.branch, job.revision)
    else:
        known = json.loads((made / RECORD_FILE).read_text(encoding="utf-8"))["source"]["sha256"]
        # The hashes are those that the conversion computed from what it read.
        source_files = replace(take(path, known), seen=seen)
        if {name: file.stat for name, file in source_files.files.items()} != before:
            raise InputError(f"{job.source}: changed while it was converted: run again when it is complete")
    # Of what was read: the rotation's file may have changed meanwhile.
    settings = job.settings | {"rotation": report.options["rotation"]}
    state = State(
        settings=settings, source=source_name(job), revision=job.revision, source_files=source_files,
        output_files=take(made), verified=report.fidelity is not None, figures=_figures(report),
        norms=(report.converted, report.total), run=job.run,
    )  # fmt: skip
    return report, state


def _figures(report: Report) -> dict[str, Any]:
    found = report.fidelity.to_json() if report.fidelity is not None else {}
    return {name: found[name] for name in FIGURES if name in found}


def _result(report: Report) -> Result:
    return Result(
        "converted", norms=(report.converted, report.total), figures=_figures(report),
        bytes_written=report.bytes_written, notes=tuple(report.notes),
    )  # fmt: skip


def _upload(job: Job, folder: Path, done: Result, say: Say) -> Result:
    """Upload a finished output to the hub, if the job says so, and note that in its state."""
    if job.upload is None:
        return done
    from normconvert.apply.upload import upload

    say("stage", {"name": "upload"})
    repo = job.upload.repo
    upload(folder, repo, job.method, private=job.upload.private, output=str(job.output))
    state = read_state(folder)
    if state is not None:
        write_state(folder, replace(state, uploaded=repo))
    return replace(done, uploaded=repo)


@contextmanager
def _told(say: Say) -> Iterator[tuple[Callable[[str], None], Callable[[str, int, int], None]]]:
    """What ``convert`` takes for ``stage`` and ``progress``, passed on at a bearable pace."""
    last = 0.0

    def stage(name: str) -> None:
        if not isinstance(name, Step):
            say("stage", {"name": name})

    def progress(name: str, done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        # The last word always: a bar that ends at 97 % looks like a failure.
        if now - last >= EVERY or done == total:
            last = now
            say("progress", {"done": done, "total": total})

    yield stage, progress
