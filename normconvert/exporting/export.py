"""Checkpoint -> one file that runs without normconvert: ONNX, or a program of torch.export.

The file is run on probes of several batch sizes before it is put in place, against the model it was made of and, if
one is named, against the original checkpoint.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normconvert.errors import FidelityError, InputError, NormConvertError, TraceError, first_line
from normconvert.exporting.request import Export
from normconvert.files.user_paths import user_path
from normconvert.interrupts import held as uninterrupted
from normconvert.options import taking

if TYPE_CHECKING:
    from torch import Tensor, nn

    from normconvert.sources import Source

SUFFIXES = (".onnx", ".pt2")
TOLERANCE = 1e-4
"""Relative error in float32: other kernels add up in another order, over all layers."""
OPSET = 23
"""The first with RMSNormalization."""

Run = Callable[[Mapping[str, Any]], "list[Tensor]"]
"""Named input tensors -> output tensors."""


@dataclass(frozen=True)
class ExportReport:
    """What was exported and how close it is.

    Attributes:
        source: what was exported.
        file: the file written.
        dynamic: names of the dimensions that may vary, of each input.
        outputs: names of the outputs, in order.
        error: largest relative error over probes and outputs, against the model that was exported.
        against: largest relative error against the original checkpoint, if one was named.
        bytes_written: size of the file, and of the weights beside it if ONNX keeps them apart.
        notes: sentences for the user.
    """

    source: str
    file: str
    dynamic: dict[str, list[str]]
    outputs: list[str]
    error: float
    against: float | None
    bytes_written: int
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The report as JSON-ready data."""
        return asdict(self)


@taking(Export)
def export(request: Export) -> ExportReport:
    """Export a checkpoint, converted or not, to ``file``; verified before it appears there.

    Raises:
        InputError: bad input or usage, or the ONNX packages are missing.
        TraceError: the exporter cannot follow the model.
        FidelityError: the exported file computes something else; nothing was written.
    """
    src, against, trust_remote_code = request.src, request.against, request.trust_remote_code
    file = user_path(request.file)
    # Before torch is imported: a wrong name is told at once.
    check_file(file, request.overwrite)
    from normconvert.sources.converted import load_opened, open_any
    from normconvert.tracing.probes import verification_inputs

    # In float32 whatever is stored: the tolerance is for that, and not every runtime has kernels for halves.
    source = open_any(src, trust_remote_code=trust_remote_code)
    model = load_opened(source).float()
    probes = [p.inputs for p in verification_inputs(model, seed=0)]
    call = Flat(model, probes)
    if not call.probes:
        raise TraceError(f"{src}: the model runs on none of the probes: {call.failure}")
    beside = file.with_name(f".{file.name}.partial-{os.getpid()}")
    # A folder, since ONNX may write the weights into a second file; beside the target, so that a rename puts it there.
    beside.mkdir()
    staged = beside / file.name
    try:
        with _quiet():
            program, dynamic, notes = _program(call)
            run = (_save_onnx if file.suffix == ".onnx" else _save_program)(call, program, staged)
        error = _compare(run, call.run, call.varied(dynamic))
        # Not `>`: NaN is not close either.
        if not error <= TOLERANCE:
            raise FidelityError(
                f"{src}: the exported file is {error:.2g} off the model (allowed {TOLERANCE:g}); nothing was written"
            )
        distance = None
        if against is not None:
            other = open_any(against, trust_remote_code=trust_remote_code)
            distance = _compare(run, Flat(load_opened(other).float(), probes).run, call.varied(dynamic))
            notes += _held_against(source, other, error, distance)
        size = sum(path.stat().st_size for path in beside.iterdir())
        _put_in_place(beside, file)
    except OSError as failure:
        raise InputError(f"cannot write {file}: {failure.strerror or failure}; nothing was kept") from failure
    finally:
        for path in beside.iterdir():
            path.unlink()
        beside.rmdir()
    return ExportReport(str(src), str(file), dynamic, call.names, error, distance, size, tuple(notes))


def _put_in_place(beside: Path, file: Path) -> None:
    """Move what was exported to where it belongs: at no moment is there one model's file with another's weights."""
    data = file.with_name(f"{file.name}.data")
    names = [path.name for path in beside.iterdir()]
    with uninterrupted():
        if data.exists() or len(names) > 1:
            file.unlink(missing_ok=True)
        # The file that names the other comes last.
        for name in sorted(names, key=lambda name: name == file.name):
            os.replace(beside / name, file.with_name(name))
        if data.name not in names:
            data.unlink(missing_ok=True)


def _held_against(source: Source, other: Source, error: float, distance: float) -> list[str]:
    """What there is to say of the distance of an exported file, which computes what its source does, to the original.

    Raises:
        FidelityError: the two models differ, and neither is there to differ.
    """
    if distance <= TOLERANCE:
        return []
    exact = f"the file computes what {source.reference} computes (to {error:.1g})"
    for one in (source, other):
        method = str(((one.record or {}).get("plan") or {}).get("method"))
        if method.startswith("swap "):
            return [
                f"{one.reference} is a {method}: its norms learnt what they compute, and {distance:.2g} is how far "
                f"{source.reference} is from {other.reference}; {exact}"
            ]
    raise FidelityError(
        f"{exact}, but that model is {distance:.2g} off {other.reference} (allowed {TOLERANCE:g}): "
        "`normconvert verify` says where they part; nothing was written"
    )


def check_file(file: Path, overwrite: bool) -> None:
    """Refuse a file that cannot be made, before any work is done.

    Raises:
        InputError: another suffix, no such folder, it exists, or a package is missing.
    """
    if file.suffix not in SUFFIXES:
        raise InputError(f"{file}: expected a name that ends in {' or '.join(SUFFIXES)}")
    if not file.parent.is_dir():
        raise InputError(f"{file}: the folder {file.parent} does not exist: make it first")
    for path in (file, file.with_name(f"{file.name}.data")):
        if path.exists() and not (overwrite and file.exists()):
            raise InputError(f"{path} exists: choose another name, or pass --overwrite")
    if file.suffix == ".onnx":
        from importlib.util import find_spec

        # By name only: to import them takes seconds.
        missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
        if missing:
            raise InputError(f"ONNX needs {', '.join(missing)}: pip install 'normconvert[onnx]'")


class Flat:
    """A model as a function of named tensors that returns a list of tensors; other arguments are fixed."""

    def __init__(self, model: nn.Module, probes: Sequence[Mapping[str, Any]]) -> None:
        import torch
        from torch import nn

        self.model, self.failure = model.eval(), ""
        self.names: list[str] = []
        self.probes: list[dict[str, Any]] = []
        outer = self

        # torch.export takes a module, and named tensors only.
        class Module(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def forward(self, **tensors: Tensor) -> tuple[Tensor, ...]:
                return tuple(value for _, value in outer.tensors(self.model(**tensors, **outer.fixed)))

        self.fixed: dict[str, Any] = {}
        self.module = Module().eval()
        for probe in probes:
            tensors = {k: v for k, v in probe.items() if isinstance(v, torch.Tensor)}
            fixed = {k: v for k, v in probe.items() if not isinstance(v, torch.Tensor)}
            # What is no tensor becomes part of the program: all probes have to agree on it.
            if self.probes and (set(tensors) != set(self.probes[0]) or fixed != self.fixed):
                continue
            self.fixed = fixed
            try:
                with torch.no_grad():
                    names = [name for name, _ in self.tensors(model(**tensors, **fixed))]
            except Exception as error:  # a model may refuse a probe in any way
                self.failure = first_line(error)
                continue
            self.names = self.names or names
            self.probes.append(tensors)

    @staticmethod
    def tensors(output: Any, name: str = "output") -> list[tuple[str, Tensor]]:
        """The floating tensors of an output, with names; caches and the like are left out."""
        import torch

        if isinstance(output, torch.Tensor):
            # Integers, such as chosen tokens, have no relative error.
            return [(name, output)] if output.is_floating_point() else []
        if isinstance(output, dict):
            items = [(str(key), value) for key, value in output.items() if "past_key_values" not in str(key)]
        elif isinstance(output, (tuple, list)):
            items = [(f"{name}_{i}", value) for i, value in enumerate(output)]
        else:
            items = []
        return [found for key, value in items for found in Flat.tensors(value, key)]

    def run(self, tensors: Mapping[str, Any]) -> list[Tensor]:
        """The outputs of the model itself."""
        import torch

        with torch.no_grad():
            return list(self.module(**tensors))

    def varied(self, dynamic: Mapping[str, Sequence[str]]) -> list[Mapping[str, Any]]:
        """The probes that the exported file must take: with a dynamic batch of all sizes, else those of one shape."""
        if any(dynamic.values()):
            first = self.probes[0]
            return [
                p for p in self.probes
                if all("length" in dynamic[k] or p[k].shape[1:] == first[k].shape[1:] for k in p)
            ]  # fmt: skip
        shapes = {k: v.shape for k, v in self.probes[0].items()}
        return [p for p in self.probes if {k: v.shape for k, v in p.items()} == shapes]


def _program(call: Flat) -> tuple[Any, dict[str, list[str]], list[str]]:
    """Export with the freest shapes that the model allows: batch and length, batch, none."""
    import torch

    batches = [min(v.shape[0] for v in p.values() if v.ndim) for p in call.probes]
    # The largest batch: torch.export takes a size of 1 for a constant.
    example: dict[str, Any] = dict(call.probes[batches.index(max(batches))])
    error: Exception | None = None
    # The freest first. Only trying tells which sizes a model's code fixes.
    for free in (("batch", "length"), ("batch",), ()):
        # A length is the second dimension of tokens and masks; that of pictures is their channels.
        names = {k: [d for d in free if d == "batch" or (v.ndim == 2 and not v.is_floating_point())]
                 for k, v in example.items()}  # fmt: skip
        if "length" in free and not any("length" in n for n in names.values()):
            continue
        at = {"batch": 0, "length": 1}
        shapes = {k: {at[d]: torch.export.Dim(d, min=1) for d in n} for k, n in names.items()}
        try:
            program = torch.export.export(call.module, (), example, dynamic_shapes={"tensors": shapes}, strict=False)
        except Exception as failure:  # torch.export raises many kinds
            error = failure
            continue
        note = [] if free else ["the batch size is fixed: the model does not allow another one"]
        return program, names, note
    assert error is not None
    raise TraceError(f"torch.export cannot follow the model: {first_line(error)[:300]}")


def _save_program(call: Flat, program: Any, file: Path) -> Run:
    import torch

    torch.export.save(program, file)
    # The file is run, not the program in memory: what is verified is what somebody else will load.
    module = torch.export.load(file).module()

    def run(tensors: Mapping[str, Any]) -> list[Tensor]:
        with torch.no_grad():
            return list(module(**tensors))

    return run


def _save_onnx(call: Flat, program: Any, file: Path) -> Run:
    import onnxruntime
    import torch

    try:
        made: Any = torch.onnx.export(program, dynamo=True, opset_version=OPSET, output_names=call.names, verbose=False)
        made.save(str(file), external_data=_is_large(call.model))
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    except NormConvertError:
        raise
    except Exception as error:  # the exporter and the runtime raise many kinds
        raise TraceError(f"ONNX cannot express the model: {first_line(error)[:300]}") from error
    names = [i.name for i in session.get_inputs()]

    def run(tensors: Mapping[str, Any]) -> list[Tensor]:
        # The exporter drops inputs that nothing reads, and a session refuses what it does not know.
        found = session.run(None, {k: v.numpy() for k, v in tensors.items() if k in names})
        return [torch.from_numpy(value) for value in found]

    return run


def _is_large(model: nn.Module) -> bool:
    """Whether the weights exceed what one protobuf may hold."""
    return sum(p.numel() * 4 for p in model.parameters()) > 1_800_000_000


def _compare(run: Run, wanted: Run, probes: Sequence[Mapping[str, Any]]) -> float:
    """The largest relative error over probes and outputs; infinite where the file does not run."""
    worst = 0.0
    for probe in probes:
        expected = wanted(probe)
        try:
            found = run(probe)
        except Exception as error:  # whatever a runtime raises: the file does not do its work
            raise FidelityError(f"the exported model does not run on a probe: {first_line(error)[:300]}") from error
        if len(found) != len(expected):
            # One that is missing or too many: no number of the others makes up for it.
            return float("inf")
        for a, b in zip(found, expected, strict=True):
            # An output of zeros is no reason to divide by zero.
            off = float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))
            worst = max(worst, off if off == off else float("inf"))
    return worst


@contextmanager
def _quiet() -> Iterator[None]:
    import logging

    from normconvert.runtime import process_lock

    # What follows, and what the exporters do, is of the whole process.
    with process_lock(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        level = logging.root.manager.disable
        # All loggers: the exporters have one for each module.
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)


__all__ = ["ExportReport", "check_file", "export"]
