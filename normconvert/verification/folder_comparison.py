"""Two folders that should hold the same bytes: what differs, named as a person would look for it.

Weights are compared tensor by tensor, JSON key by key, everything else as bytes; never more than a block is in memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normconvert.apply.output_folder import WEIGHT_PATTERNS, list_files
from normconvert.errors import InputError
from normconvert.files.safetensors_file import FLOATING, Header, map_tensor, read_header

if TYPE_CHECKING:
    from normconvert.files.tensor_info import TensorInfo

CHUNK = 1 << 22
SHOWN = 60
"""Characters of a JSON value that are worth showing."""


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be.

    Attributes:
        part: ``record``, ``source``, ``plan``, ``weights``, ``config`` or ``files``.
        name: what differs: a tensor, a key, or the file itself.
        file: the file that holds it, relative to its folder; empty if it is none.
        what: how it differs; a sentence without its subject.
    """

    part: str
    name: str
    file: str
    what: str

    @property
    def subject(self) -> str:
        """``h.0.attn.weight in model.safetensors``, or the file alone."""
        return self.name if self.file in ("", self.name) else f"{self.name} in {self.file}"

    @property
    def sentence(self) -> str:
        """The whole of it."""
        return f"{self.subject} {self.what}"


def compare_folders(expected: Path, found: Path, skip: Sequence[str] = ()) -> Iterator[Finding]:
    """What differs in ``found`` from ``expected``.

    Args:
        expected: the folder as it should be.
        found: the folder as it is.
        skip: patterns of file names that are not compared; never weights or config.json.
    """
    right, there = (
        {
            name: path
            for name, path in list_files(folder).items()
            if part_of(name) != "files" or not _matches(name, skip)
        }
        for folder in (expected, found)
    )
    for name, path in right.items():
        if name not in there:
            yield Finding(part_of(name), name, name, "is missing")
        elif not same_bytes(path, there[name]):
            yield from _compare_file(name, path, there[name], right)
    for name in there:
        if name not in right:
            yield Finding(part_of(name), name, name, "is not a file of this conversion")


def part_of(name: str) -> str:
    """Which part of a checkpoint a file belongs to."""
    if _matches(name, WEIGHT_PATTERNS):
        return "weights"
    return "config" if name == "config.json" else "files"


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) or fnmatch(name.rpartition("/")[2], pattern) for pattern in patterns)


def same_bytes(a: Path, b: Path) -> bool:
    """Whether two files hold the same bytes."""
    if not b.is_file() or a.stat().st_size != b.stat().st_size:
        return False
    return _same_range(a, 0, b, 0, a.stat().st_size)


def _same_range(a: Path, at_a: int, b: Path, at_b: int, count: int) -> bool:
    with a.open("rb") as left, b.open("rb") as right:
        left.seek(at_a)
        right.seek(at_b)
        while count > 0:
            x, y = left.read(min(CHUNK, count)), right.read(min(CHUNK, count))
            if x != y or not x:
                return False
            count -= len(x)
    return True


def _compare_file(name: str, expected: Path, found: Path, right: dict[str, Path]) -> Iterator[Finding]:
    part = part_of(name)
    other = next((n for n, path in right.items() if n != name and part_of(n) == part and same_bytes(path, found)), None)
    if other is not None:
        yield Finding(part, name, name, f"holds what belongs into {other}: the files are swapped")
    elif name.endswith(".safetensors"):
        yield from _compare_weights(name, expected, found)
    elif name.endswith(".json"):
        yield from _compare_json(name, expected, found)
    else:
        yield Finding(part, name, name, "differs from what the conversion writes")


def _compare_json(name: str, expected: Path, found: Path) -> Iterator[Finding]:
    part = part_of(name)
    try:
        data = json.loads(found.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        yield Finding(part, name, name, f"is not valid JSON ({error})")
        return
    differences = list(compare_data(json.loads(expected.read_text(encoding="utf-8")), data))
    for key, what in differences:
        yield Finding(part, key or name, name, what)
    if not differences:
        yield Finding(part, name, name, "holds the same data in another form than the conversion writes")


def compare_data(expected: Any, found: Any, at: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, how it differs) of two JSON values; both are walked together."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in dict.fromkeys([*expected, *found]):
            inner = f"{at}.{key}" if at else str(key)
            if key not in found:
                yield inner, f"is missing, expected {_short(expected[key])}"
            elif key not in expected:
                yield inner, f"is {_short(found[key])}, expected no such key"
            else:
                yield from compare_data(expected[key], found[key], inner)
    elif isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        for index, (a, b) in enumerate(zip(expected, found, strict=True)):
            yield from compare_data(a, b, f"{at}.{index}" if at else str(index))
    elif type(expected) is not type(found) or expected != found:
        yield at, f"is {_short(found)}, expected {_short(expected)}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"


def _compare_weights(name: str, expected: Path, found: Path) -> Iterator[Finding]:
    header = read_header(expected)
    try:
        other = read_header(found)
    except InputError as error:
        yield Finding("weights", name, name, f"cannot be read: {str(error).removeprefix(f'{found}: ')}")
        return
    findings = list(_compare_tensors(name, header, other))
    if len(findings) > 1 and {f.name for f in findings} >= {*header.tensors, *other.tensors}:
        examples = ", ".join(f.name for f in findings[:2])
        what = f"is another checkpoint's: every one of its {len(findings)} tensors differs ({examples}, …)"
        findings = [Finding("weights", name, name, what)]
    if not findings:
        what = "has other metadata" if header.metadata != other.metadata else "has its tensors in another order"
        findings = [Finding("weights", name, name, f"{what} than the conversion writes")]
    yield from findings


def _compare_tensors(file: str, expected: Header, found: Header) -> Iterator[Finding]:
    for name in dict.fromkeys([*expected.tensors, *found.tensors]):
        a, b = expected.tensors.get(name), found.tensors.get(name)
        if b is None:
            yield Finding("weights", name, file, "is missing")
        elif a is None:
            yield Finding("weights", name, file, "is no tensor of this conversion")
        elif (a.dtype, a.shape) != (b.dtype, b.shape):
            what = f"is {b.dtype} {list(b.shape)}, expected {a.dtype} {list(a.shape)}"
            yield Finding("weights", name, file, what)
        elif not _same_range(a.file, a.start, b.file, b.start, a.end - a.start):
            yield Finding("weights", name, file, _values(a, b))


def _values(a: TensorInfo, b: TensorInfo) -> str:
    """How the values of two tensors of one form differ; a flipped sign of a zero or a NaN counts."""
    import torch

    left, right = map_tensor(a).reshape(-1), map_tensor(b).reshape(-1)
    width = left.element_size()
    count, first, largest = 0, -1, 0.0
    for start in range(0, left.numel(), CHUNK):
        x, y = left[start : start + CHUNK], right[start : start + CHUNK]
        differs = (x.view(torch.uint8).view(-1, width) != y.view(torch.uint8).view(-1, width)).any(1)
        here = int(differs.sum())
        if not here:
            continue
        count += here
        first = start + int(differs.nonzero()[0]) if first < 0 else first
        if a.dtype in FLOATING:
            apart = (x[differs].double() - y[differs].double()).abs()
            largest = max(largest, float(torch.nan_to_num(apart, nan=torch.inf).max()))
    place = [int(i) for i in torch.unravel_index(torch.tensor(first), a.shape)] if a.shape else []
    by = f" by at most {largest:.3g}" if a.dtype in FLOATING else ""
    return f"differs in {count} of {left.numel()} values{by}, first at {place}"
