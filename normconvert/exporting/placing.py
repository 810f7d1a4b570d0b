"""Where an export appears: refused before any work if it cannot, and put there whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from normconvert.apply.output_folder import replace
from normconvert.errors import InputError
from normconvert.exporting.request import Export
from normconvert.interrupts import held as uninterrupted

SUFFIXES = (".onnx", ".pt2")


def is_folder(file: Path) -> bool:
    """Whether a folder of files is asked for."""
    return not file.suffix


def check_request(request: Export, file: Path) -> None:
    """Refuse what cannot be made, before any work is done.

    Raises:
        InputError: another suffix, no such folder, it exists, an option that does not fit, or a package is missing.
    """
    if not is_folder(file) and file.suffix not in SUFFIXES:
        raise InputError(f"{file}: expected a name that ends in {' or '.join(SUFFIXES)}, or a folder's")
    if not file.parent.is_dir():
        raise InputError(f"{file}: the folder {file.parent} does not exist: make it first")
    for path in (file, file.with_name(f"{file.name}.data")):
        if path.exists() and not (request.overwrite and file.exists()):
            raise InputError(f"{path} exists: choose another name, or pass --overwrite")
    if is_folder(file) and file.exists() and not _is_export(file):
        raise InputError(f"{file} exists, and is no export of an encoder and a decoder: choose another name")
    if file.suffix == ".pt2":
        if request.opset is not None or request.target != "generic":
            raise InputError("--opset and --target are for ONNX files")
        return
    from importlib.util import find_spec

    # By name only: to import them takes seconds.
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise InputError(f"ONNX needs {', '.join(missing)}: pip install 'normconvert[onnx]'")
    from normconvert.exporting.engines import check_opset

    check_opset(request.opset)


def _is_export(folder: Path) -> bool:
    """Whether a folder is one of an encoder and a decoder, and may be replaced by another."""
    return (folder / "decoder_with_past_model.onnx").is_file()


@contextmanager
def staged(file: Path) -> Iterator[Path]:
    """A folder beside the target, so that a rename puts there what is written; gone afterwards.

    Raises:
        InputError: nothing can be written there.
    """
    beside = file.with_name(f".{file.name}.partial-{os.getpid()}")
    try:
        beside.mkdir()
        yield beside
    except OSError as failure:
        raise InputError(f"cannot write {file}: {failure.strerror or failure}; nothing was kept") from failure
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def put_in_place(beside: Path, file: Path) -> None:
    """Move what was exported to where it belongs: at no moment is there one model's file with another's weights."""
    if is_folder(file):
        made = beside / "made"
        made.mkdir()
        for path in [path for path in beside.iterdir() if path != made]:
            os.replace(path, made / path.name)
        replace(made, file, _is_export)
        return
    with uninterrupted():
        data = file.with_name(f"{file.name}.data")
        names = [path.name for path in beside.iterdir()]
        if data.exists() or len(names) > 1:
            file.unlink(missing_ok=True)
        # The file that names the other comes last.
        for name in sorted(names, key=lambda name: name == file.name):
            os.replace(beside / name, file.with_name(name))
        if data.name not in names:
            data.unlink(missing_ok=True)
