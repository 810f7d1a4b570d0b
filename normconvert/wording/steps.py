"""What a command says while it works: a step within a stage, and what is known already."""

from __future__ import annotations

from typing import Any


class Step(str):
    """What is done next, as text; listeners that want a bar read the numbers.

    Attributes:
        done: steps of the stage that are done.
        total: all of them; 0 where nobody knows yet.
    """

    done: int
    total: int

    def __new__(cls, text: str, done: int, total: int) -> Step:
        """The text with its place."""
        made: Any = super().__new__(cls, text)
        made.done, made.total = done, total
        return made


class Fact(str):
    """What is known of the source already, as text: a line that stays, whatever takes its time next."""

    __slots__ = ()
