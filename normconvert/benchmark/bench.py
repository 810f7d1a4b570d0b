"""``normconvert bench``: original, converted, and the bound, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from normconvert.benchmark.request import Benchmarking
from normconvert.errors import InputError, NothingToConvert
from normconvert.files.user_paths import user_path
from normconvert.option_fields import check_options, taking
from normconvert.options import METHODS, OF_TENSORS, Options, check_device

if TYPE_CHECKING:
    import torch
    from torch import nn

    from normconvert.benchmark.compare import Progress
    from normconvert.benchmark.result import Benchmark, Row
    from normconvert.benchmark.workloads import Workload
    from normconvert.plan.conversion_plan import Plan
    from normconvert.sources import Source
    from normconvert.tracing.graph import Graph


@taking(Benchmarking)
def bench(request: Benchmarking) -> Benchmark:
    """Time a model beside its conversion and beside itself without its norms, interleaved in this process.

    The model without its norms is the *bound*: nothing that only touches norms can be faster. Without ``out`` it says
    what there is to gain before anything is converted.

    Raises:
        InputError: bad input or usage.
        TraceError: the model cannot be traced, or no input is known for it.
        NothingToConvert: no norm can be converted, so there is nothing to gain.
    """
    check_options(request)
    if request.seconds <= 0:
        raise InputError(f"seconds is {request.seconds:g}; expected more than 0")
    where = _set_up(request.device, request.graphs, request.threads)
    from normconvert.benchmark.versions import versions
    from normconvert.benchmark.workloads import grid
    from normconvert.sources import open_source

    say = request.progress or (lambda line: None)
    source, out = open_source(str(request.src), **request.opening), request.out
    plan = _recorded_plan(source, out) if out is not None else _made_plan(source, request.method)
    works = grid(source.skeleton(), request.batch, request.length, request.decode)
    setting = _Setting(
        modes=("eager", *["compiled"] * request.compile, *["graphs"] * request.graphs),
        dtype=_dtype(source, request.dtype),
        device=where,
        seconds=request.seconds,
    )
    say("loading")
    models = versions(source, out, plan, works[0], setting.dtype, where)
    rows = _measured(models, works, setting, say)
    return _benchmark(_Subject(str(request.src), source, out, plan, models), setting, rows)


@dataclass(frozen=True)
class _Setting:
    """How all models are measured.

    Attributes:
        modes: rows of :data:`normconvert.benchmark.steps.MODES`.
        dtype: of all parameters.
        device: where to run.
        seconds: for each cell.
    """

    modes: tuple[str, ...]
    dtype: torch.dtype
    device: torch.device
    seconds: float


@dataclass(frozen=True)
class _Subject:
    """What is measured: its name as the user gave it, the source, the folder made of it, the plan, and the models."""

    name: str
    source: Source
    out: str | Path | None
    plan: Plan
    models: Mapping[str, nn.Module]


def _set_up(device: str, graphs: bool, threads: int | None) -> torch.device:
    """The device, checked, and torch's threads, set."""
    import torch

    check_device(device)
    where = torch.device(device)
    if graphs and where.type != "cuda":
        raise InputError(f"graphs are CUDA's, and the device is {device}")
    if threads is not None:
        torch.set_num_threads(threads)
    return where


def _dtype(source: Source, name: str) -> torch.dtype:
    import torch

    found: torch.dtype = source.dtype if name == "auto" else getattr(torch, name)
    return found


def _measured(
    models: Mapping[str, nn.Module], works: Sequence[Workload], setting: _Setting, say: Progress
) -> tuple[Row, ...]:
    """A row a mode and workload."""
    from normconvert.benchmark.compare import compare

    cells = [(mode, work) for mode in setting.modes for work in works]
    rows = []
    for number, (mode, work) in enumerate(cells, 1):
        say(f"measuring {work.name} {mode} ({number} of {len(cells)})")
        rows.append(compare(models, work, mode, setting.dtype, setting.device, setting.seconds))
    return tuple(rows)


def _benchmark(subject: _Subject, setting: _Setting, rows: tuple[Row, ...]) -> Benchmark:
    """What was measured, and on what machine."""
    from normconvert.benchmark.machine import machine
    from normconvert.benchmark.memory import parameter_bytes
    from normconvert.benchmark.result import Benchmark

    return Benchmark(
        source=subject.name,
        converted=None if subject.out is None else str(subject.out),
        library=subject.source.library,
        architecture=subject.source.architecture,
        method=subject.plan.method,
        norms={"converted": len(subject.plan.converted), "total": len(subject.plan.verdicts)},
        device=str(setting.device),
        dtype=str(setting.dtype).removeprefix("torch."),
        machine=machine(setting.device),
        parameter_bytes={name: parameter_bytes(model) for name, model in subject.models.items()},
        rows=rows,
    )


def _recorded_plan(source: Source, out: str | Path) -> Plan:
    """The plan that the converted folder was made by."""
    from normconvert.files.weight_files import load_json
    from normconvert.plan.conversion_plan import Plan
    from normconvert.plan.conversion_record import RECORD_FILE, read_record

    folder = user_path(out)
    if not folder.is_dir():
        raise InputError(f"{out}: no such folder; expected one that normconvert wrote from {source.reference}")
    record = read_record(folder)
    if record["architecture"] != source.architecture:
        raise InputError(
            f"expected two checkpoints of one model, found {source.architecture} in {source.reference} and "
            f"{record['architecture']} in {out}"
        )
    if not (folder / RECORD_FILE).is_file():
        raise InputError(f"{folder}: no {RECORD_FILE}, which says what norms were converted: convert again")
    try:
        return Plan.from_json(load_json(folder / RECORD_FILE)["plan"])
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{folder / RECORD_FILE}: cannot be read ({error!r}): convert again") from error


def _made_plan(source: Source, method: str | None) -> Plan:
    """The plan of the method, or of the first one that converts any norm of this model."""
    from normconvert.rewrites.planning import plan_model
    from normconvert.rewrites.registry import REWRITES
    from normconvert.tracing.model_graph import trace_model

    model = source.skeleton()
    graph = trace_model(model)

    # A method may ask for the graph of another model as well, an edited one; tracing this one again would take as long.
    def tracer(wanted: nn.Module) -> Graph:
        return graph if wanted is model else trace_model(wanted)

    wanted = (
        [method] if method is not None else [name for name in METHODS if name in REWRITES and name not in OF_TENSORS]
    )
    norms = 0
    for name in wanted:
        plan = plan_model(model, Options(), name, tracer)
        norms += len(plan.verdicts)
        if plan.converted:
            return plan
    what = " or ".join(dict.fromkeys(METHODS[name] for name in wanted))
    if not norms:
        raise NothingToConvert(f"{source.reference}: nothing to gain: {source.architecture} has no {what}")
    raise NothingToConvert(
        f"{source.reference}: nothing to gain: none of {norms} norms can be converted; "
        f"`normconvert inspect {source.reference}` says why"
    )


__all__ = ["bench"]
