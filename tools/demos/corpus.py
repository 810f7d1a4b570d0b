"""The King James text that the demo language model learns from: where it is found, and how it is cut.

Debian packages the text in a compressed form that only its own reader understands::

    apt-get install bible-kjv
    bible -f gen1:1-rev22:21 > kjv.txt

which gives one verse a line, ``Ge1:1 In the beginning God created the heaven and the earth.`` The text is in the public
domain (Debian's copyright file: "expired since the translation was done in 1611").
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

HELD_OUT = ("Ruth", "Eccl", "Jonah", "Jas")
"""Whole books, of four kinds (story, wisdom, prophet, letter), that the model never sees."""

_VERSE = re.compile(r"^(?P<book>\d?[A-Za-z]+)(?P<chapter>\d+):(?P<verse>\d+) (?P<text>.*)$")


@dataclass(frozen=True)
class Corpus:
    """Books as plain text: one verse a line, an empty line between chapters."""

    train: list[str]
    held_out: list[str]


def read_bible(text: Path | None = None) -> str:
    """The whole text with its references, one verse a line.

    Args:
        text: a file in that form; None: ask Debian's ``bible`` reader.

    Raises:
        SystemExit: no file was given and the reader is not installed.
    """
    if text is not None:
        return text.read_text(encoding="utf-8")
    reader = shutil.which("bible")
    if reader is None:
        raise SystemExit("no King James text: give --text FILE, or install it with: apt-get install bible-kjv")
    command = [reader, "-f", "gen1:1-rev22:21"]
    # Anything on standard input would be taken for a query.
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=True)
    return result.stdout.decode("utf-8")


def _verses(lines: str) -> Iterator[tuple[str, str, str]]:
    for number, line in enumerate(lines.splitlines(), 1):
        match = _VERSE.match(line)
        if match is None:
            raise SystemExit(f"line {number} is no verse: expected 'Ge1:1 In the ...', found {line[:40]!r}")
        yield match["book"], match["chapter"], match["text"].strip()


def cut(lines: str) -> Corpus:
    """Split the text into books to learn from and books held out, without references.

    Raises:
        SystemExit: a line is not of the form ``BookChapter:Verse text``, or a held-out book is missing.
    """
    train: list[str] = []
    held_out: list[str] = []
    for book, verses in groupby(_verses(lines), key=lambda verse: verse[0]):
        chapters = groupby(verses, key=lambda verse: verse[1])
        text = "\n".join("".join(f"{verse[2]}\n" for verse in chapter) for _, chapter in chapters)
        (held_out if book in HELD_OUT else train).append(text)
    if len(held_out) != len(HELD_OUT):
        raise SystemExit(f"expected the whole King James text with the books {', '.join(HELD_OUT)}; some are missing")
    return Corpus(train, held_out)
