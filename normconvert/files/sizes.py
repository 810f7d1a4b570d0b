"""Sizes in bytes, as people write them."""

from __future__ import annotations

import re

from normconvert.errors import InputError


def parse_size(text: str, what: str = "--max-shard-size") -> int:
    """Bytes from ``5GB``, ``500MB``, ``2GiB`` or a plain number, as huggingface reads them (GB is 10⁹, GiB 2³⁰).

    Args:
        text: what was written.
        what: where, for the error.

    Raises:
        InputError: it is none of these.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT])(I?)B?|B)?\s*", text.upper())
    size = 0
    if match:
        number, letter, binary = match.groups()
        size = int(float(number) * (1024 if binary else 1000) ** ("KMGT".index(letter) + 1 if letter else 0))
    if size < 1:
        raise InputError(f"{what} {text}: expected a size such as 5GB, 500MB or 2GiB")
    return size
