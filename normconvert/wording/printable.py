"""Names of tensors, files and keys in what is printed: text, whatever is in it."""

from __future__ import annotations

import re

_COLOUR = re.compile(r"\x1b\[[0-9;]*m|\x1b\]8;[^\x07\x1b]*\x1b\\\\")
"""What rich writes for colours and links."""
# Control characters, and those that turn the direction of the text or end a line without looking so.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# What a CI runner would take for a command: `::` at the beginning of a line, `##[` anywhere.
_COMMAND = re.compile(r"^(\s*)(?=::)|(?=##\[)")


def printable(text: str) -> str:
    """``text`` for a terminal or a log: control characters are escaped, and no line is a command of a CI runner."""
    return "\n".join(_line(line) for line in text.split("\n"))


def _line(line: str) -> str:
    colours = _COLOUR.findall(line)
    pieces = [_CONTROL.sub(_escaped, piece) for piece in _COLOUR.split(line)]
    bare = "".join(pieces)
    if "##[" not in bare and not bare.lstrip().startswith("::"):
        return "".join(piece + colour for piece, colour in zip(pieces, [*colours, ""], strict=True))
    return _COMMAND.sub(r"\1\\", bare)


def _escaped(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode("ascii")
