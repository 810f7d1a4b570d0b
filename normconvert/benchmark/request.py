"""What a benchmark is asked: its options, each defined once. Nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, MISSING, dataclass
from pathlib import Path

from normconvert.errors import InputError
from normconvert.option_fields import option
from normconvert.options import DTYPES, METHODS, SHORT_DTYPES, SRC, Opening


def _numbers(text: str, spelled: str) -> list[int]:
    """``1,8`` as numbers.

    Raises:
        InputError: it is something else.
    """
    parts = text.replace(" ", "").split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise InputError(f"{spelled} {text}: expected numbers from 1 on, such as 1,8")
    return list(dict.fromkeys(int(part) for part in parts))


@dataclass(frozen=True)
class Benchmarking(Opening):
    """What :func:`normconvert.bench` is asked; ``progress`` is told of each cell before it is measured."""

    src: str | Path = option(MISSING, SRC, metavar="SRC")
    out: str | Path | None = option(
        None,
        "Its conversion; without it, only what there is to gain is measured.",
        metavar="OUT", positional=True,
    )  # fmt: skip
    _: KW_ONLY
    batch: Sequence[int] | None = option(None, "Batch sizes.  [default: 1,8]", metavar="N,N", parse=_numbers)
    length: Sequence[int] | None = option(None, "Tokens.  [default: 32,512]", metavar="N,N", parse=_numbers)
    compile: bool = option(False, "Also under torch.compile.")
    graphs: bool = option(False, "Also captured in CUDA graphs.")
    decode: bool = option(
        True, "For a causal language model: one token with a cache, too.", spelling="--decode/--no-decode"
    )
    device: str = option("cpu", "Where to run: cpu, cuda, cuda:1, mps.", metavar="DEVICE")
    dtype: str = option("auto", "Run in this dtype; auto is that of SRC's files.", choices=DTYPES, aliases=SHORT_DTYPES)
    seconds: float = option(3.0, "For each row, but five rounds at least.", metavar="S")
    threads: int | None = option(None, "On the CPU; else torch's choice.", metavar="N", at_least=1)
    method: str | None = option(
        None,
        f"Without OUT: the conversion in question ({', '.join(METHODS)}); else the first that applies.",
        metavar="METHOD", choices=tuple(METHODS),
    )  # fmt: skip
    progress: Callable[[str], None] | None = None
