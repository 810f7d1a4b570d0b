"""The Python API: `convert`, `inspect`. The command line calls these, `verify` and `load`, and nothing else."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from . import __version__
from .errors import FidelityError, InputError, NormConvertError, NothingToConvert

if TYPE_CHECKING:
    import torch

    from .fidelity import Fidelity
    from .plan import Plan
    from .sources import Source

RECORD_FORMAT = 1
METHODS = ("rmsnorm",)
SHIFTED = "shifted outputs: "
DTYPES = ("auto", "float32", "bfloat16", "float16")

Failure = TypeVar("Failure", bound=NormConvertError)
Stage = Callable[[str], None]
"""Called with the name of each stage as it begins: ``open``, ``trace``, ``write``, ``verify``."""


@dataclass(frozen=True)
class Report:
    """What a conversion did, or would do.

    Attributes:
        source: what the user named.
        library: ``transformers`` or ``timm``.
        architecture: class or model name.
        method: the conversion.
        out: the output folder; None for a dry run or an inspection.
        plan: tensor edits, module edits and a verdict for every norm.
        fidelity: the three figures, or None if not verified.
        dtype: dtype of the source's weights.
        stored: dtype that the output's weights are stored in.
        bytes_written: size of the weight files written.
        tensors_edited: how many tensors were edited or added.
        tensors_copied: how many were copied as they were.
        seconds: stage -> seconds it took.
        notes: sentences for the user.
    """

    source: str
    library: str
    architecture: str
    method: str
    out: str | None
    plan: Plan
    fidelity: Fidelity | None = None
    dtype: str = ""
    stored: str = ""
    bytes_written: int = 0
    tensors_edited: int = 0
    tensors_copied: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def converted(self) -> int:
        """Number of norms converted."""
        return len(self.plan.converted)

    @property
    def total(self) -> int:
        """Number of norms with a verdict."""
        return len(self.plan.verdicts)

    def to_json(self) -> dict[str, Any]:
        """The report as JSON-ready data."""
        data = {k: v for k, v in self.__dict__.items() if k not in ("plan", "fidelity")}
        return data | {
            "normconvert": __version__,
            "norms": {"converted": self.converted, "total": self.total},
            "plan": self.plan.to_json(),
            "fidelity": self.fidelity.to_json() if self.fidelity else None,
        }


def inspect(
    src: str | Path,
    *,
    revision: str | None = None,
    arch: str | None = None,
    fold: bool = False,
    tied: str = "center",
    min_gain: int = 3,
    allow_shifted_outputs: bool = False,
    trust_remote_code: bool = False,
    stage: Stage | None = None,
) -> Report:
    """What :func:`convert` would do with ``src``, norm by norm; writes nothing.

    Raises:
        InputError: the source is not a usable checkpoint.
        TraceError: the model cannot be traced.
    """
    _, report = _plan(
        src, "rmsnorm", revision, arch, fold, tied, min_gain, allow_shifted_outputs, trust_remote_code, stage
    )
    return report


def convert(
    src: str | Path,
    out: str | Path,
    method: str = "rmsnorm",
    *,
    revision: str | None = None,
    arch: str | None = None,
    dtype: str = "auto",
    fold: bool = False,
    tied: str = "center",
    min_gain: int = 3,
    allow_shifted_outputs: bool = False,
    device: str = "cpu",
    max_shard_size: int | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    verify: bool = True,
    require_all: bool = False,
    trust_remote_code: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
    stage: Stage | None = None,
) -> Report:
    """Convert the norms of a checkpoint and write the result to ``out``, complete or not at all.

    Args:
        src: hub id (``name``, ``org/name``, ``@revision``), folder, weight file (with ``arch``), or ``demo:NAME``.
        out: the folder to make.
        method: ``rmsnorm``.
        revision: branch, tag or commit on the hub.
        arch: ``timm:NAME`` for bare weights.
        dtype: store the weights in this dtype; ``auto`` keeps each tensor's own.
        fold: move the norms' weight and bias into the linear maps that read them, where each can take them.
        tied: ``center`` centres the output of an embedding that is also the output head; ``untie`` centres a copy.
        min_gain: insert a centring operation only where it wins at least this many norms.
        allow_shifted_outputs: the per-token mean of returned hidden states may change.
        device: where verification runs.
        max_shard_size: bytes a weight file; None keeps the source's files.
        overwrite: replace an ``out`` that exists, once the new one is complete.
        dry_run: plan only.
        verify: check the result numerically before ``out`` appears.
        require_all: refuse unless every norm can be converted.
        trust_remote_code: allow code that comes with the checkpoint to run.
        progress: called with (tensor, bytes done, bytes in all) while writing.
        stage: called with each stage's name as it begins.

    Returns:
        A report with the plan, the verdicts and the fidelity figures.

    Raises:
        InputError: bad input or usage.
        TraceError: the model cannot be traced.
        NothingToConvert: no norm, or with ``require_all`` not every norm, can be converted; its ``report`` has the
            verdicts.
        FidelityError: the result differs from the original; ``out`` was not made. Its ``report`` has the figures.
    """
    from .apply import write_checkpoint
    from .apply_output import check_output, staged_output

    if method not in METHODS:
        raise InputError(f"unknown method {method!r}; expected one of {', '.join(METHODS)}")
    if dtype not in DTYPES:
        raise InputError(f"unknown dtype {dtype!r}; expected one of {', '.join(DTYPES)}")
    out = Path(out).expanduser()
    say = stage or (lambda name: None)
    local = Path(src).expanduser()
    if not dry_run:
        check_output(out, local if local.exists() else None, overwrite)
        if verify:
            check_device(device)
    source, report = _plan(
        src, method, revision, arch, fold, tied, min_gain, allow_shifted_outputs, trust_remote_code, stage
    )
    _refuse_if_pointless(report, require_all)
    if dry_run:
        return report
    stored = _torch_dtype(dtype)
    report = replace(report, stored=report.stored if dtype == "auto" else dtype)
    seconds = dict(report.seconds)
    with staged_output(out, source.folder or source.files[0], overwrite) as folder:
        say("write")
        start = time.perf_counter()
        written = write_checkpoint(
            source, report.plan, folder, dtype=stored, max_shard_size=max_shard_size, progress=progress,
            extra_files=_loading_files(source, report.plan, dtype),
        )  # fmt: skip
        seconds["write"] = time.perf_counter() - start
        report = replace(
            report,
            out=str(out),
            bytes_written=written.bytes_written,
            tensors_edited=len(written.edited),
            tensors_copied=written.copied,
            seconds=seconds,
            notes=tuple(dict.fromkeys((*report.notes, *written.notes))),
        )
        _write_record(folder, source, report, written.hashes)
        if verify:
            say("verify")
            start = time.perf_counter()
            report = replace(report, fidelity=_fidelity(source, report.plan, folder, stored, device))
            seconds["verify"] = time.perf_counter() - start
            if report.fidelity is None or not report.fidelity.passed:
                raise _with_report(FidelityError(_fidelity_message(report)), replace(report, out=None))
        _write_record(folder, source, report, written.hashes)
        _write_card(folder, source, report)
    return report


def _plan(
    src: str | Path,
    method: str,
    revision: str | None,
    arch: str | None,
    fold: bool,
    tied: str,
    min_gain: int,
    allow_shifted_outputs: bool,
    trust_remote_code: bool,
    stage: Stage | None,
) -> tuple[Source, Report]:
    if tied not in ("center", "untie"):
        raise InputError(f"unknown value {tied!r} for tied; expected center or untie")
    if min_gain < 1:
        raise InputError(f"min_gain is {min_gain}; expected 1 or more")
    say = stage or (lambda name: None)
    say("open")
    start = time.perf_counter()
    from .sources import open_source

    source = open_source(str(src), revision=revision, arch=arch, trust_remote_code=trust_remote_code)
    model = source.skeleton()
    opened = time.perf_counter()
    say("trace")
    from .pipeline import plan_model
    from .rewrites.centring import Options

    plan = plan_model(model, Options(tied, min_gain, allow_shifted_outputs, fold))
    traced = time.perf_counter()
    return source, Report(
        source=str(src),
        library=source.library,
        architecture=source.architecture,
        method=method,
        out=None,
        plan=plan,
        dtype=str(source.dtype).removeprefix("torch."),
        stored=str(source.dtype).removeprefix("torch."),
        seconds={"open": opened - start, "trace": traced - opened},
        notes=tuple(plan.notes),
    )


def _refuse_if_pointless(report: Report, require_all: bool) -> None:
    plan = report.plan
    if not plan.verdicts:
        message = f"{report.source}: nothing to do: {report.architecture} has no LayerNorm"
        raise _with_report(NothingToConvert(message), report)
    from .report.collapse import Row, collapse

    groups = collapse(Row(v.path, v.reason, v.kind) for v in plan.kept)
    times = [f" (×{group.count})" if group.count > 1 else "" for group in groups]
    reasons = "".join(f"\n  {group.name}{n}: {group.text}" for group, n in zip(groups, times, strict=True))
    if not plan.converted:
        message = f"{report.source}: none of {report.total} norms can be converted:{reasons}"
        raise _with_report(NothingToConvert(message), report)
    if require_all and plan.kept:
        message = f"{report.source}: {len(plan.kept)} of {report.total} norms cannot be converted:{reasons}"
        raise _with_report(NothingToConvert(message), report)


def _with_report(error: Failure, report: Report) -> Failure:
    """The error with the attribute ``report``: verdicts and figures for whoever catches it."""
    vars(error)["report"] = report
    return error


def check_device(device: str) -> None:
    """Refuse a device that is not there, before any work is done.

    Raises:
        InputError: torch does not know it, or cannot use it here.
    """
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"device {device!r} cannot be used here: {reason}") from error


def _torch_dtype(name: str) -> torch.dtype | None:
    import torch

    return None if name == "auto" else getattr(torch, name)


def _loading_files(source: Source, plan: Plan, dtype: str) -> dict[str, str | bytes]:
    if source.library != "transformers":
        return {}
    from .loading import huggingface_files

    config = dict(source.config)
    if dtype != "auto":
        config["dtype"] = dtype
        config.pop("torch_dtype", None)
    return huggingface_files(config, plan, source.architecture)


def _fidelity(source: Source, plan: Plan, folder: Path, stored: torch.dtype | None, device: str) -> Fidelity:
    import torch

    from .loading import load
    from .probes import verification_inputs
    from .verification import tolerance_for, verify_models

    dtype = stored or source.dtype
    shifted = next((n for n in plan.notes if n.startswith(SHIFTED)), "")
    trust = source.trust_remote_code
    probes = verification_inputs(source.skeleton(), seed=0, tokenizer=source.tokenizer())
    return verify_models(
        truth=lambda: source.load(dtype=torch.float64, device=device),
        algebra=None,
        plan=plan,
        original=lambda: source.load(dtype=dtype, device=device),
        converted=lambda: load(folder, dtype=dtype, device=device, trust_remote_code=trust),
        probes=probes,
        tolerance=tolerance_for(plan),
        converted_norms=[v.path for v in plan.converted],
        shifted_outputs=set(shifted.removeprefix(SHIFTED).split(", ")) - {""},
    )


def _fidelity_message(report: Report) -> str:
    reasons = "; ".join(report.fidelity.reasons) if report.fidelity else "not verified"
    return f"{report.source}: the converted model differs from the original: {reasons}; nothing was written"


def _write_record(folder: Path, source: Source, report: Report, hashes: dict[str, str]) -> None:
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


def _write_card(folder: Path, source: Source, report: Report) -> None:
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
