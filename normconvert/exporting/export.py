"""Checkpoint -> files that run without normconvert: ONNX, or a program of torch.export.

Each file is run by the engine that will run it, on inputs of several sizes and with masks, before it is put in place:
against the model it was made of and, if one is named, against the original checkpoint.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normconvert.errors import FidelityError, InputError, NormConvertError
from normconvert.exporting.placing import check_request, is_folder, put_in_place, staged
from normconvert.exporting.request import Export
from normconvert.files.user_paths import user_path
from normconvert.option_fields import check_options, taking
from normconvert.options import Opening

if TYPE_CHECKING:
    from torch import nn

    from normconvert.exporting.capture import Captured
    from normconvert.exporting.compare import Compared
    from normconvert.exporting.engines import Run
    from normconvert.exporting.parts import Part
    from normconvert.sources import Source


@dataclass(frozen=True)
class ExportedFile:
    """One file of an export.

    Attributes:
        file: where it is.
        inputs: name -> sizes, in order: a number, or the name of what may vary.
        outputs: names, in order.
        opset: of ONNX, else None.
        varies: what may vary -> the smallest size that was run, the largest there can be (None: no limit is known).
        error: largest relative error over inputs and outputs, against the model that was exported.
        checks: how many inputs it was run on, of different sizes where they may vary.
        engines: what it was run in.
    """

    file: str
    inputs: dict[str, list[int | str]]
    outputs: list[str]
    opset: int | None
    varies: dict[str, tuple[int, int | None]]
    error: float
    checks: int
    engines: tuple[str, ...]


@dataclass(frozen=True)
class ExportReport:
    """What was exported and how close it is.

    Attributes:
        source: what was exported.
        file: the file written, or the folder.
        files: the files, one by one.
        dtype: of the weights.
        error: the largest of the files' errors.
        against: largest relative error against the original checkpoint, if one was named.
        bytes_written: size of all, weights that ONNX keeps beside a file included.
        notes: sentences for the user.
    """

    source: str
    file: str
    files: list[ExportedFile]
    dtype: str
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
        TraceError: the exporter cannot follow the model, or the engine has not its operators.
        FidelityError: the exported file computes something else; nothing was written.
    """
    file = user_path(request.file)
    # Before torch is imported: a wrong name is told at once.
    check_options(request)
    check_request(request, file)
    source, model = _opened(request.src, request.dtype, request.how)
    return export_model(model, request, source)


def export_model(model: nn.Module, request: Export, source: Source | None = None) -> ExportReport:
    """Export a model that is loaded; ``source`` is what it is a model of.

    Raises:
        NormConvertError: as :func:`export`.
    """
    from normconvert.exporting.norm_operators import DEFAULT_OPSETS

    file = user_path(request.file)
    opsets: Sequence[int | None] = [request.opset] if request.opset else DEFAULT_OPSETS[request.target]
    if file.suffix == ".pt2":
        opsets = [None]
    notes = list(source.notes) if source is not None else []
    with staged(file) as beside, _quiet():
        parts = _parts(model, request, file)
        made = [
            _exported(part, beside / (f"{part.name}.onnx" if is_folder(file) else file.name), request, opsets)
            for part in parts
        ]
        error = max(one.compared.error for one in made)
        notes += dict.fromkeys(one.note for one in made if one.note)
        off = None
        if request.against is not None and source is not None:
            off, more = _against(request, file, made, source)
            notes += more
        size = sum(path.stat().st_size for path in beside.iterdir())
        put_in_place(beside, file)
    return ExportReport(
        str(request.src), str(file), [one.described(file) for one in made],
        str(next(model.parameters()).dtype).removeprefix("torch."), error, off, size, tuple(notes),
    )  # fmt: skip


def _against(request: Export, file: Path, made: Sequence[_Made], source: Source) -> tuple[float, list[str]]:
    """How far the files are from the original, and what there is to say of it."""
    from normconvert.exporting.compare import attended, distance, fitting

    assert request.against is not None
    # A bare file needs the architecture, too; the rest of what opens SRC is its own.
    arch = request.arch if user_path(request.against).is_file() else None
    how = Opening(arch=arch, trust_remote_code=request.trust_remote_code)
    other, original = _opened(request.against, request.dtype, how)
    parts = _parts(original, request, file, like=[one.part for one in made])
    off = max(
        distance(attended(one.part, check, one.run(check)), attended(part, check, part.run(check)))
        for one, part in zip(made, parts, strict=True)
        for check in fitting(one.part, one.captured)
    )
    error, allowed = (max(getattr(one.compared, what) for one in made) for what in ("error", "allowed"))
    return off, _held_against(source, other, error, off, allowed)


@dataclass(frozen=True)
class _Made:
    """One file, and how it came about."""

    part: Part
    captured: Captured
    compared: Compared
    run: Run
    name: str
    limits: dict[str, int]
    opset: int | None
    engines: tuple[str, ...]
    note: str

    def described(self, file: Path) -> ExportedFile:
        """What there is to say of it."""
        inputs = {
            name: [self.captured.free[name].get(axis, int(size)) for axis, size in enumerate(value.shape)]
            for name, value in self.part.inputs.items()
        }
        varies = {}
        for what in dict.fromkeys(name for axes in self.captured.free.values() for name in axes.values()):
            _, most = self.captured.ranges.get(what, (0, None))
            limits = [limit for limit in (most, self.limits.get(what)) if limit is not None]
            # torch says 2 where it means any size; what was run says more than that.
            varies[what] = (self.compared.least[what], min(limits, default=None))
        path = file / self.name if is_folder(file) else file
        return ExportedFile(
            str(path), inputs, list(self.part.outputs), self.opset, varies, self.compared.error, self.compared.sizes,
            self.engines,
        )  # fmt: skip


def _opened(src: str | Path, dtype: str, how: Opening) -> tuple[Source, nn.Module]:
    import torch

    from normconvert.sources.converted import load_opened, open_any

    source = open_any(src, **how.opening)
    return source, load_opened(source, dtype=None if dtype == "auto" else getattr(torch, dtype)).eval()


def _parts(model: nn.Module, request: Export, file: Path, like: Sequence[Part] = ()) -> list[Part]:
    """What becomes a file each; ``like`` other parts, of which the inputs are taken."""
    from normconvert.exporting.examples import examples
    from normconvert.exporting.parts import whole
    from normconvert.exporting.pasts import against_whole, encoder_decoder, with_past

    src = str(request.src)
    found = examples(model, request.inputs, src)
    if is_folder(file):
        return list(encoder_decoder(model, found, src))
    if not request.with_past:
        if like:
            found = replace(found, inputs=like[0].inputs, checks=[dict(check) for check in like[0].checks])
        return [whole(model, found)]
    part = with_past(model, found, src)
    off = against_whole(model, part)
    if not off <= 1e-3:
        raise FidelityError(f"{src}: with a past the model itself is {off:.2g} off what it computes of the whole text")
    return [part]


def _exported(part: Part, file: Path, request: Export, opsets: Sequence[int | None]) -> _Made:
    """Write one part, with the freest shapes that hold in the engine.

    Raises:
        TraceError: the exporter cannot follow it.
        FidelityError: the file is wrong even where all sizes are fixed.
    """
    from normconvert.exporting.capture import TEXT, captures, longest
    from normconvert.exporting.compare import compare
    from normconvert.exporting.engines import save_onnx, save_program
    from normconvert.exporting.second_engine import compared_in_openvino

    failure: NormConvertError | None = None
    for captured, opset in ((captured, opset) for captured in captures(part) for opset in opsets):
        try:
            if opset is None:
                run = save_program(part, captured, file)
            else:
                run = save_onnx(part, captured, file, opset, request.target)
            compared = compare(run, part, captured)
            engines, note = ["torch" if opset is None else "onnxruntime"], ""
            # The operators that are onnxruntime's own are nobody else's.
            if opset is not None and request.target != "onnxruntime":
                needed = request.target == "openvino"
                second, note = compared_in_openvino(file, part, captured, needed=needed)
                if second is not None:
                    engines.append("openvino")
                    compared = replace(compared, error=max(compared.error, second.error))
        except NormConvertError as error:
            failure = error
            continue
        texts = {what for axes in captured.free.values() for what in axes.values()} & set(TEXT[1:3])
        limits = {what: most for what in texts if (most := longest(part, what)) is not None}
        if "length" in limits:
            # A past and the tokens that follow it have the places of one text.
            limits |= {"total_length": limits["length"], "past_length": limits["length"] - 1}
        return _Made(part, captured, compared, run, file.name, limits, opset, tuple(engines), note)
    assert failure is not None
    raise type(failure)(f"{request.src}: {failure}; nothing was written") from failure


def _held_against(source: Source, other: Source, error: float, off: float, allowed: float) -> list[str]:
    """What there is to say of the distance of an exported file, which computes what its source does, to the original.

    Raises:
        FidelityError: the two models differ, and neither is there to differ.
    """
    if off <= allowed:
        return []
    exact = f"the file computes what {source.reference} computes (to {error:.1g})"
    for one in (source, other):
        method = str(((one.record or {}).get("plan") or {}).get("method"))
        if method.startswith("swap "):
            return [
                f"{one.reference} is a {method}: its norms learnt what they compute, and {off:.2g} is how far "
                f"{source.reference} is from {other.reference}; {exact}"
            ]
    raise FidelityError(
        f"{exact}, but that model is {off:.2g} off {other.reference} (allowed {allowed:g}): "
        "`normconvert verify` says where they part; nothing was written"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    import contextlib
    import io
    import logging

    from normconvert.runtime import process_lock

    # What follows, and what the exporters do, is of the whole process.
    with process_lock(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        level = logging.root.manager.disable
        # All loggers: the exporters have one for each module.
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)


__all__ = ["ExportReport", "ExportedFile", "InputError", "export"]
