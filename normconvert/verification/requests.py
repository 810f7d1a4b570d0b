"""What a verification and a check are asked: their options, each defined once. Nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, MISSING, dataclass
from pathlib import Path
from typing import Any

from normconvert.option_fields import option, parse_size
from normconvert.options import (
    DTYPES,
    EXAMPLE,
    GIVEN,
    LEVEL,
    LEVELS,
    REVISION,
    SHORT_DTYPES,
    SOURCE,
    TRUST,
    Network,
    Stage,
)


def _dtype(text: str, spelled: str) -> Any:
    import torch

    return None if text == "auto" else getattr(torch, text)


def _limits(path: str, spelled: str) -> dict[str, float]:
    from normconvert.verification.limits import read_limits

    return read_limits(Path(path))


@dataclass(frozen=True)
class Verification:
    """What :func:`normconvert.verify` is asked; ``stage`` is told of each run of a model as it begins."""

    a: str | Path | Network = option(MISSING, "The original, as SRC of the other commands.", metavar="A", model=True)
    b: str | Path | Network = option(
        MISSING, "The converted one, or any other of the same model.", metavar="B", model=True
    )
    _: KW_ONLY
    example_inputs: Any = option(None, EXAMPLE, console=False)
    device: Any = option("cpu", "Where to run: cpu, cuda, cuda:1, mps.", metavar="DEVICE", parse=lambda text, _: text)
    dtype: Any = option(
        None, "Run both in this dtype; auto is that of B's files.", choices=DTYPES, aliases=SHORT_DTYPES, parse=_dtype
    )
    seed: int = option(0, "Of the probes.", metavar="N")
    level: str = option("standard", LEVEL, choices=LEVELS)
    trust_remote_code: bool = option(False, TRUST, panel=SOURCE)
    max_memory: int | None = option(
        None, "Such as 4GB: leave the weights in their files and read them in turn.", metavar="SIZE", parse=parse_size
    )
    limits: Mapping[str, float] | None = option(
        None, "YAML: figure and limit, instead of the default limits.", metavar="FILE", parse=_limits
    )
    rotation: str | None = option(None, GIVEN, metavar="FILE")
    stage: Stage | None = None


@dataclass(frozen=True)
class Checking:
    """What :func:`normconvert.check` is asked.

    Attributes:
        stage: called with each stage's name as it begins: ``open``, ``trace``, ``replay``, ``compare``,
            ``verify``.
        progress: called with (tensor, bytes done, bytes in all) while the plan is replayed.
    """

    out: Path | str = option(MISSING, "The output folder of a conversion.", metavar="OUT")
    source: str | Path | None = option(
        None, "What was converted; needed where that was a local folder or file.", metavar="SRC"
    )
    _: KW_ONLY
    revision: str | None = option(None, REVISION, metavar="REV", panel=SOURCE)
    ignore: Sequence[str] = option(
        (), "Files not to compare, such as '*.txt'; not for weights. Repeatable.", metavar="PATTERN"
    )
    measure: bool = option(False, "Measure the recorded figures of the verification again.")
    trust_remote_code: bool = option(False, TRUST, panel=SOURCE)
    rotation: str | None = option(None, GIVEN, metavar="FILE")
    stage: Stage | None = None
    progress: Callable[[str, int, int], None] | None = None
