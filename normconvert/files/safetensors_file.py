"""The safetensors format, read without trusting it: u64 header length, JSON header, data.

Format: https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Callable
from contextlib import nullcontext
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from normconvert.errors import InputError
from normconvert.files.tensor_info import TensorInfo, check_name

if TYPE_CHECKING:
    import torch

MAX_HEADER = 100_000_000  # the limit of the reference implementation

# dtype name -> (bytes an element, torch dtype name). F4/F6 pack several elements in a byte and are quantised: not here.
DTYPES: dict[str, tuple[int, str]] = {
    "BOOL": (1, "bool"),
    "U8": (1, "uint8"),
    "I8": (1, "int8"),
    "F8_E5M2": (1, "float8_e5m2"),
    "F8_E4M3": (1, "float8_e4m3fn"),
    "F8_E5M2FNUZ": (1, "float8_e5m2fnuz"),
    "F8_E4M3FNUZ": (1, "float8_e4m3fnuz"),
    "F8_E8M0": (1, "float8_e8m0fnu"),
    "I16": (2, "int16"),
    "U16": (2, "uint16"),
    "F16": (2, "float16"),
    "BF16": (2, "bfloat16"),
    "I32": (4, "int32"),
    "U32": (4, "uint32"),
    "F32": (4, "float32"),
    "C64": (8, "complex64"),
    "F64": (8, "float64"),
    "I64": (8, "int64"),
    "U64": (8, "uint64"),
}
FLOATING = frozenset({"F16", "BF16", "F32", "F64"})


class Header(NamedTuple):
    """A checked header: the tensors by offset, the ``__metadata__`` strings, the raw bytes up to the data."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    raw: bytes


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors dtype name."""
    import torch

    dtype = getattr(torch, DTYPES[name][1])
    assert isinstance(dtype, torch.dtype)
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """The safetensors name of a torch dtype.

    Raises:
        InputError: safetensors cannot hold it.
    """
    short = str(dtype).removeprefix("torch.")
    for name, (_, torch_name) in DTYPES.items():
        if torch_name == short:
            return name
    raise InputError(f"safetensors cannot hold tensors of dtype {short}")


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file against the file's size.

    Raises:
        InputError: the file is truncated, corrupt, or holds a dtype that is not supported.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as handle:
            first = handle.read(8)
            length = int.from_bytes(first, "little")
            # Before it is read: the length is the file's own claim, and may be more memory than there is.
            if size < 8 or length > min(size - 8, MAX_HEADER):
                what = "is empty" if size == 0 else f"has {size} bytes, but its header claims {length} after 8"
                raise InputError(f"{path}: not a safetensors file or truncated: it {what}; download it again")
            raw = first + handle.read(length)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    try:
        header = json.loads(raw[8:])
        if not isinstance(header, dict):
            raise ValueError("the header is not an object")
        metadata = header.pop("__metadata__", {}) or {}
        if not isinstance(metadata, dict):
            raise ValueError("__metadata__ is not an object")
        tensors = [_entry(path, name, entry, len(raw), size) for name, entry in header.items()]
    # RecursionError: of lists in lists, without end.
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: corrupt safetensors header: {_short(error)}; download it again") from error
    # By both ends: a tensor without elements begins where the next one does, and comes before it.
    tensors.sort(key=lambda info: (info.start, info.end))
    at = len(raw)
    # The data has neither gaps nor overlaps: bytes that no tensor names could be anything, and a byte of two tensors
    # would be edited twice. A name that is there twice leaves a gap as well, since json keeps the last.
    for info in tensors:
        if info.start != at:
            raise InputError(f"{path}: corrupt safetensors: tensor {info.name} starts at {info.start}, expected {at}")
        at = info.end
    if at != size:
        raise InputError(f"{path}: truncated or corrupt safetensors: {size} bytes found, the header describes {at}")
    return Header({info.name: info for info in tensors}, {str(k): str(v) for k, v in metadata.items()}, raw)


def _entry(path: Path, name: str, entry: dict[str, Any], data: int, size: int) -> TensorInfo:
    check_name(path, name)
    start, end = entry["data_offsets"]
    shape, dtype = tuple(entry["shape"]), entry["dtype"]
    # Exactly: 1.0 is not the number of a byte, nor is `true`, and 1e400 is no number at all.
    if not all(type(n) is int for n in (start, end, *shape)) or not isinstance(dtype, str):
        raise ValueError(f"tensor {name}: offsets and shape have to be whole numbers, dtype a text")
    if dtype not in DTYPES:
        raise InputError(f"{path}: tensor {name} has dtype {dtype[:20]!r}: quantised checkpoints are not supported")
    expected = math.prod(shape) * DTYPES[dtype][0]
    # Each dimension for itself: the product of two negative ones looks like a size.
    if min(shape, default=0) < 0 or start < 0 or end - start != expected:
        raise InputError(
            f"{path}: corrupt safetensors: tensor {name} ({dtype} {list(shape)}) needs {expected} bytes, "
            f"its offsets give {end - start}"
        )
    if data + end > size:
        raise InputError(
            f"{path}: truncated safetensors: tensor {name} ends at byte {data + end} of a file of {size}; "
            "download it again"
        )
    return TensorInfo(name, path, dtype, shape, data + start, data + end)


def _short(error: Exception) -> str:
    return f"{error}".split("\n")[0] or type(error).__name__


def write_header(tensors: list[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str]) -> bytes:
    """Serialise a header for tensors (name, dtype name, shape) that lie one behind the other in this order."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for name, dtype, shape in tensors:
        end = at + math.prod(shape) * DTYPES[dtype][0]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the data starts 8-byte aligned
    return len(text).to_bytes(8, "little") + text


def map_tensor(info: TensorInfo) -> torch.Tensor:
    """The tensor as a private mapping of the file (copy on write); shape and dtype as in the header."""
    import torch

    dtype = torch_dtype(info.dtype)
    # Nothing can be mapped, and the place may be the end of the file.
    if info.end == info.start:
        return torch.empty(info.shape, dtype=dtype)
    # A mapping begins at a page; the tensor somewhere in it.
    page = info.start - info.start % mmap.ALLOCATIONGRANULARITY
    with info.file.open("rb") as handle:
        # Copy on write: torch takes writable memory only, and the source is never written to.
        mapped = mmap.mmap(handle.fileno(), info.end - page, access=mmap.ACCESS_COPY, offset=page)
    if info.start % dtype.itemsize:  # not aligned: a view would be undefined, so copy
        flat = torch.frombuffer(bytearray(mapped[info.start - page :]), dtype=dtype)
    else:
        flat = torch.frombuffer(mapped, dtype=dtype, offset=info.start - page)
    return flat.reshape(info.shape)


def read_tensor(
    info: TensorInfo,
    rows: tuple[int, int] | None = None,
    memory: Callable[[int], torch.Tensor] | None = None,
    opened: FileIO | None = None,
) -> torch.Tensor:
    """The tensor, or its rows ``[first, last)`` along dimension 0, read into memory of its own.

    Args:
        info: the tensor's place.
        rows: which of them; None: all.
        memory: gives so many bytes (uint8) to read into; None: fresh ones.
        opened: the file, unbuffered, if it is open already.

    Raises:
        InputError: the file ends before the tensor does.
    """
    import torch

    first, last = rows or (0, info.shape[0] if info.shape else 1)
    row = (info.end - info.start) // max(1, info.shape[0] if info.shape else 1)
    size = (last - first) * row
    flat = torch.empty(size, dtype=torch.uint8) if memory is None else memory(size)
    view, at = flat.numpy().data, 0
    with nullcontext(opened) if opened is not None else info.file.open("rb", buffering=0) as handle:
        handle.seek(info.start + first * row)
        while at < len(view):
            # Until all is there: an unbuffered read may give less than was asked for.
            n = handle.readinto(view[at:])
            if not n:
                raise InputError(f"{info.file}: ended while tensor {info.name} was read: is it being changed?")
            at += n
    shape = (last - first, *info.shape[1:]) if info.shape else ()
    return flat.view(torch_dtype(info.dtype)).reshape(shape)
