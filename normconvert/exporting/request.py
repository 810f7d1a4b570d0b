"""What an export is asked: its options, each defined once. Nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, MISSING, dataclass
from pathlib import Path

from normconvert.option_fields import option
from normconvert.options import CHECKED, DTYPES, SHORT_DTYPES, SRC, WRITTEN, Opening

TARGETS = ("generic", "onnxruntime", "openvino")
OPSETS = range(18, 24)
"""Of ONNX: the first is the first that torch's exporter writes by itself, the last the last that it knows."""


@dataclass(frozen=True)
class Export(Opening):
    """What :func:`normconvert.export` is asked."""

    src: str | Path = option(MISSING, SRC, metavar="SRC")
    file: Path | str = option(
        MISSING,
        "model.onnx; model.pt2 for torch.export; or a folder to make, for the ONNX files of an encoder and a decoder.",
        metavar="FILE",
    )
    _: KW_ONLY
    against: str | Path | None = option(
        None, "Compare with the original checkpoint as well.", metavar="SRC", panel=CHECKED
    )
    inputs: Sequence[str] = option(
        (), "An argument of forward to be an input, again for each; else the usual ones.", metavar="NAME"
    )
    with_past: bool = option(False, "Keys and values of earlier tokens go in and out, for generating text.")
    dtype: str = option(
        "auto", "Compute in this dtype; auto keeps that of the weights.", choices=DTYPES, aliases=SHORT_DTYPES
    )
    opset: int | None = option(None, "Version of ONNX's operators, 18 to 23; else what suits the target.", metavar="N")
    target: str = option("generic", "The engine that the ONNX file is for.", choices=TARGETS)
    overwrite: bool = option(False, "Replace a FILE that exists, once the new one is whole.", panel=WRITTEN)
