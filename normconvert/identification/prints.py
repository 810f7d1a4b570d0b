"""The fingerprints of timm's models, and which of them a checkpoint's names and shapes fit.

A fingerprint is what ``state_dict()`` holds when the model is built with default arguments: names and shapes. The
classifier stands apart: what is gone without classes, with ``n`` for the number of classes. Integers (counters, index
tables) and buffers that are no statistics may be there or not: no library needs them.

The index, ``data/timm.xz``, is text: a line ``name height,width,...`` for each tensor under the model's ``=name``,
``!`` before those of the classifier, ``~`` before pairs that are one tensor, ``?`` before patterns of what may be there
(a number between dots is ``#``). Each line of one model is looked up in the set of the checkpoint's lines; only models
that share enough of them are parsed.
"""

from __future__ import annotations

import lzma
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from normconvert.files.tensor_info import COUNTER
from normconvert.identification.result import Shape

INDEX = Path(__file__).parent / "data" / "timm.xz"
CLASSES = 0
"""Stands for the number of classes in the shape of a classifier's tensor: no dimension of a real one is 0."""
PARSED = 40
"""So many of the models that share most with a checkpoint are compared tensor by tensor."""
NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


@dataclass(frozen=True)
class Print:
    """Names and shapes of one architecture.

    Attributes:
        name: timm's model name.
        core: what must be there, with its shape.
        head: the classifier: all there with one number of classes (:data:`CLASSES` in a shape), or all absent.
        tied: (first name, other name) of one tensor: one of its names has to be there.
        optional: patterns of names that may be there, of any shape.
    """

    name: str
    core: dict[str, Shape]
    head: dict[str, Shape] = field(default_factory=dict)
    tied: tuple[tuple[str, str], ...] = ()
    optional: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Fit:
    """How a checkpoint differs from a fingerprint; ``num_classes`` is None if its classifier says no one number."""

    name: str
    num_classes: int | None
    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    reshaped: tuple[tuple[str, Shape, Shape], ...] = ()

    @property
    def differences(self) -> int:
        """How many tensors differ."""
        return len(self.missing) + len(self.extra) + len(self.reshaped)


@dataclass(frozen=True)
class Index:
    """The fingerprints by model, as text, and the version of timm they are of."""

    timm: str
    models: dict[str, str]


@cache
def load_index(path: Path = INDEX) -> Index:
    """The index that comes with the package."""
    head, *models = lzma.decompress(path.read_bytes()).decode().split("\n=")
    named = (text.partition("\n") for text in models)
    return Index(head.removeprefix("timm "), {name: lines for name, _, lines in named})


def save_index(index: Index, path: Path) -> None:
    """Write an index; the same index gives the same bytes."""
    text = "".join([f"timm {index.timm}", *(f"\n={name}\n{lines}" for name, lines in sorted(index.models.items()))])
    # With the highest preset on purpose: it is written once and travels with every installation.
    path.write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))


def pattern(name: str) -> str:
    """A tensor's name with ``#`` for the numbers of layers: ``blocks.#.attn.qkv.weight``."""
    return NUMBER.sub("#", name)


def line(name: str, shape: Shape) -> str:
    """One tensor in the index."""
    return f"{name} {','.join(map(str, shape))}"


def write_print(found: Print) -> str:
    """The lines of one model in the index."""
    return "\n".join(
        [line(name, shape) for name, shape in found.core.items()]
        + [f"!{line(name, shape)}" for name, shape in found.head.items()]
        + [f"~{a} {b}" for a, b in found.tied]
        + [f"?{name}" for name in sorted(found.optional)]
    )


def read_print(name: str, text: str) -> Print:
    """The inverse of :func:`write_print`."""
    parts: dict[str, list[tuple[str, str]]] = {"!": [], "~": [], "?": [], "": []}
    for row in text.split("\n"):
        # No tensor's name begins with a mark: modules and parameters are attributes.
        mark = row[:1] if row[:1] in parts else ""
        first, _, second = row[len(mark) :].partition(" ")
        parts[mark].append((first, second))
    core, head = ({name: _shape(dims) for name, dims in parts[mark]} for mark in ("", "!"))
    return Print(name, core, head, tuple(parts["~"]), frozenset(first for first, _ in parts["?"]))


def _shape(text: str) -> Shape:
    return tuple(int(n) for n in text.split(",")) if text else ()


def compare(found: Mapping[str, Shape], integers: frozenset[str], known: Print) -> Fit:
    """What differs between a checkpoint and a fingerprint.

    Args:
        found: the checkpoint's tensors, names and shapes.
        integers: those of them that hold no floating numbers.
        known: the fingerprint.
    """
    present = {first for first, other in known.tied if first in found or other in found}
    covered = {name for pair in known.tied if pair[0] in present for name in pair}
    missing = [name for name in known.core if name not in found and name not in covered]
    reshaped = [
        (name, found[name], shape) for name, shape in known.core.items() if name in found and found[name] != shape
    ]
    head = {name: shape for name, shape in known.head.items() if name in found}
    counts = {n for name, shape in head.items() for n in _classes(found[name], shape)}
    # Two heads of a distilled model must agree; without any head there are no classes, which is a number, too.
    num_classes = (next(iter(counts)) if len(counts) == 1 else None) if head else 0
    if head:
        missing += [name for name in known.head if name not in found]
        for name, shape in head.items():
            # Where the tensors contradict each other one has to be shown as wrong: that with fewer.
            expected = tuple(n or max(counts, default=0) for n in shape)
            if found[name] != expected:
                reshaped.append((name, found[name], expected))
    extra = [
        name for name in found
        if name not in known.core and name not in known.head and name not in integers
        and pattern(name) not in known.optional and not name.endswith(COUNTER)
    ]  # fmt: skip
    return Fit(known.name, num_classes, tuple(missing), tuple(extra), tuple(reshaped))


def _classes(found: Shape, shape: Shape) -> Iterator[int]:
    """The numbers of classes that one of the classifier's tensors says."""
    if len(found) == len(shape):
        yield from (n for n, known in zip(found, shape, strict=True) if known == CLASSES)


def search(found: Mapping[str, Shape], integers: frozenset[str], models: Mapping[str, str]) -> list[Fit]:
    """The models that fit best, the best first, all that fit exactly among them.

    Args:
        found: the checkpoint's tensors, names and shapes.
        integers: those of them that hold no floating numbers.
        models: name -> the lines of its fingerprint.
    """
    # As text, so that thousands of models are compared by sets of lines and none is parsed.
    lines = {line(name, shape) for name, shape in found.items()}
    scores: list[tuple[int, str]] = []
    certain: set[str] = set()
    for name, text in models.items():
        rows, marked, ties = _rows(text)
        shared = len(lines.intersection(rows))
        if not shared:
            continue
        # Up to a constant this is how many lines either side lacks.
        scores.append((len(rows) - marked - ties - 2 * shared, name))
        # A tied pair has a line of its own, and may lack one of its two names.
        if shared >= len(rows) - marked - 2 * ties:
            certain.add(name)  # its whole core is there
    scores.sort()
    chosen = [name for _, name in scores[:PARSED]]
    # What may fit exactly is compared whatever its score: a set of answers that lacks one would look certain.
    chosen += sorted(certain.difference(chosen))
    fits = (compare(found, integers, read_print(name, models[name])) for name in chosen)
    return sorted(fits, key=lambda fit: (fit.differences, fit.name))


@cache
def _rows(text: str) -> tuple[list[str], int, int]:
    """The lines, how many of them need not be there, and how many are ties; kept for whoever identifies many files."""
    return text.split("\n"), text.count("\n!") + text.count("\n?"), text.count("\n~")


def is_exact(fit: Fit) -> bool:
    """Whether nothing differs and the classifier says one number of classes, or none is there."""
    return not fit.differences and fit.num_classes is not None
