"""The files of a converted checkpoint in a form that two versions of the package can be compared by.

What no refactoring has a hand in is taken out of `normconvert.json` and `README.md`: times, versions of libraries, and
the measured figures of the verification, whose last digits depend on the processor and the number of threads.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

Json = Any

LEFT_OUT = "(left out)"

NOISE = ("kl", "loss_difference", "worst_module")
"""Of the verification: differences of numbers that agree up to rounding, and where the largest of them happens to be.
Their very sign is chance."""

FIGURES = ("algebra", "rounding", "top1", "mean_over_rms", "original_error", "converted_error")
"""Of the verification: the largest of many rounding errors, or a ratio of two such. They are compared by `same_figure`
rather than left out: an error that has become nought, or a ratio of exactly one, means that a model was compared with
itself."""

FACTOR = 10.0
"""Figures are the same up to this factor."""

FIDELITY = re.compile(r"^## Fidelity$.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"[-+]?\d[\d.]*(e[-+]?\d+)?")


def sha256(data: bytes) -> str:
    """The digest in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def folder_hashes(folder: Path) -> dict[str, str]:
    """Digest of every file below a folder, by relative name."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): sha256(path.read_bytes()) for path in files}


def folder_record(folder: Path, temporary: str, copied: Mapping[str, str]) -> dict[str, Json]:
    """What is compared of a converted checkpoint.

    Args:
        folder: the checkpoint.
        temporary: path of the temporary folder that all of it happens in; it is left out wherever it is mentioned.
        copied: names of the files that the source has. Code that is not among them is the package's own.

    Returns:
        ``files``: digest by name, for ``normconvert.json`` and ``README.md`` of what is left of them; ``contents``:
        the content of those that are read as JSON, or by lines, to name the place where two differ; ``figures``: the
        verification's, by JSON path; ``shipped_code``: digests of code that comes from the package, which is meant to
        change with it.
    """
    hashes = folder_hashes(folder)
    code = [name for name in hashes if name.endswith(".py") and name not in copied]
    record: dict[str, Json] = {
        "files": hashes, "contents": {}, "figures": {}, "shipped_code": {name: hashes.pop(name) for name in code}
    }  # fmt: skip
    for name in hashes:
        if name == "README.md":
            text = FIDELITY.sub(lambda section: NUMBER.sub("#", section.group()), (folder / name).read_text(), count=1)
            content: Json = text.replace(temporary, "").splitlines()
        elif name == "normconvert.json":
            content, record["figures"] = normalised(json.loads((folder / name).read_text()), temporary)
        elif name == "config.json" or name.endswith(".index.json"):
            record["contents"][name] = json.loads((folder / name).read_text())
            continue  # its digest is that of its bytes
        else:
            continue
        record["contents"][name] = content
        hashes[name] = sha256(json.dumps(content).encode())  # keys in their order: that is the writer's, too
    return record


def normalised(value: Json, temporary: str = "") -> tuple[Json, dict[str, float]]:
    """JSON without what may differ between two runs, and the figures that were taken out, by JSON path."""
    figures: dict[str, float] = {}

    def walk(value: Json, at: str, measured: bool) -> Json:
        if isinstance(value, dict):
            return {key: entry(key, item, at + _step(key), measured) for key, item in value.items()}
        if isinstance(value, list):
            return [walk(item, f"{at}[{i}]", measured) for i, item in enumerate(value)]
        return value.replace(temporary, "") if temporary and isinstance(value, str) else value

    def entry(key: str, value: Json, at: str, measured: bool) -> Json:
        if key == "seconds" or (measured and key in NOISE):
            return LEFT_OUT
        if key == "versions" and isinstance(value, dict):
            return dict.fromkeys(value, LEFT_OUT)
        if key == "normconvert" and at == "$.normconvert":
            return LEFT_OUT
        if measured and key in FIGURES and isinstance(value, (int, float)):
            figures[at] = float(value)
            return LEFT_OUT
        return walk(value, at, measured or at in ("$.verification", "$.fidelity"))

    return walk(value, "$", False), figures


def same_figure(old: float | None, new: float | None) -> bool:
    """Whether two measured figures are equal, or of the same size and sign and neither of them nought."""
    if old is None or new is None or repr(old) == repr(new):
        return repr(old) == repr(new)
    return old * new > 0 and 1 / FACTOR < old / new < FACTOR


def different_paths(old: Json, new: Json, at: str = "$") -> Iterator[str]:
    """Where two JSON values differ: path, value before and value now."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            place = at + _step(key)
            if key not in old or key not in new:
                yield f"{place}: {'new' if key not in old else 'gone'}"
            else:
                yield from different_paths(old[key], new[key], place)
    elif isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new):
            yield f"{at}: {len(old)} items, now {len(new)}"
        for i, (before, now) in enumerate(zip(old, new, strict=False)):
            yield from different_paths(before, now, f"{at}[{i}]")
    elif repr(old) != repr(new):  # tells 1 from 1.0 and from true, and not one NaN from another
        yield f"{at}: {_short(old)}, now {_short(new)}"


def _step(key: str) -> str:
    return f".{key}" if key.isidentifier() else f"[{json.dumps(key)}]"


def _short(value: Json) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
