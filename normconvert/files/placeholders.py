"""Objects of other programs in a pickle, for which something empty is put: none of their code is looked up or run."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any


class Placeholder:
    """Takes whatever an object is made with and keeps nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: what an object is made with is not looked at."""

    def __setstate__(self, state: Any) -> None:
        """Nothing."""


def _of_name(index: int, mapping: bool) -> type:
    """A class of its own for each name, by which torch's refusal says which object it was about."""

    def items(cls: type, *args: Any, **kwargs: Any) -> Any:
        return OrderedDict()

    # An instance of another class is not initialised, and takes the items of a dictionary's subclass.
    inside: dict[str, Any] = {"__new__": items} if mapping else {}
    return type(f"Placeholder{index}_", (Placeholder,), inside)


def without_objects(names: Iterable[str], load: Callable[[], Any]) -> Any:
    """What ``load`` reads with ``weights_only=True``, where each global of ``names`` stands for a placeholder.

    Whether an object is filled as a dictionary is only known when it is, so it is tried.

    Raises:
        UnpicklingError: there is more in it than objects to leave out.
    """
    import torch

    wanted, mappings = list(names), set[int]()
    while True:
        kinds = [_of_name(index, index in mappings) for index in range(len(wanted))]
        known: list[Any] = list(zip(kinds, wanted, strict=True))
        try:
            with torch.serialization.safe_globals(known):
                return load()
        except pickle.UnpicklingError as error:
            told = {index for index, kind in enumerate(kinds) if kind.__name__ in str(error)} - mappings
            if not told:
                raise
            mappings |= told
