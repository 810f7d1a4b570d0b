"""Pickled checkpoints (.bin, .pth, .pt), only ever read with ``weights_only=True`` (invariant I7)."""

from __future__ import annotations

import argparse
import pickle
import pickletools
import warnings
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normconvert.errors import InputError, first_line
from normconvert.files.pickle_names import ALLOWED, WRAPPERS, unprefixed

if TYPE_CHECKING:
    import torch


def read_pickle(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a pickled checkpoint, mapped from the file where the format allows it.

    Raises:
        InputError: the pickle wants to run code, or the file is no checkpoint.
    """
    import torch

    if path.stat().st_size == 0:
        raise InputError(f"{path}: the file is empty; download it again")
    try:
        # timm's training checkpoints hold their argparse.Namespace: plain data, allowed as timm allows it.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice on pickle protocols
            # Mapped if it is a zip file: values stay on the disk until they are used. Older files cannot be.
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    # The first of these: it is what weights_only raises, and all others say no more than that the file is broken.
    except pickle.UnpicklingError as error:
        raise InputError(_refusal(path)) from error
    except (OSError, RuntimeError) as error:  # of a file that ends early; torch's own text is a paragraph
        raise InputError(f"{path}: not a PyTorch checkpoint, or truncated; download it again") from error
    # The bytes decide what an unpickler runs into: no list of exceptions would be complete.
    except Exception as error:
        raise InputError(f"{path}: not a PyTorch checkpoint, or truncated: {first_line(error)}") from error
    tensors = _tensors(loaded)
    if not tensors:
        raise InputError(f"{path}: holds no tensors: expected a state dict, found {type(loaded).__name__}")
    return tensors


def _refusal(path: Path) -> str:
    """What to say of a pickle that ``weights_only`` stopped; torch's own text would advise to switch it off."""
    wanted = _globals(path)
    if wanted:
        return (
            f"{path}: refused: this pickle wants to run code ({', '.join(wanted)}); ask for the weights as safetensors"
        )
    return f"{path}: not a PyTorch checkpoint, or truncated; download it again"


def _globals(path: Path) -> list[str]:
    """The globals beyond torch's own that a pickle names, found by reading its operations, not by running them."""
    import torch

    if zipfile.is_zipfile(path):
        with suppress(Exception):
            return list(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        return []
    found: list[str] = []
    with path.open("rb") as handle, suppress(Exception):  # until the bytes are no pickle any more
        for _ in range(4):  # old torch files are a few pickles one behind the other
            strings: list[str] = []
            for operation, argument, _at in pickletools.genops(handle):
                if operation.name in ("GLOBAL", "INST"):
                    found.append(str(argument).replace(" ", "."))
                elif operation.name == "STACK_GLOBAL":
                    found.append(".".join(strings[-2:]))
                elif isinstance(argument, str):
                    strings.append(argument)
    return [name for name in dict.fromkeys(found) if not name.startswith(ALLOWED)]


def _tensors(loaded: Any) -> dict[str, torch.Tensor]:
    import torch

    if isinstance(loaded, Mapping):
        # The first in timm's order: a file that holds averaged weights beside the trained ones means the averaged.
        loaded = next((loaded[k] for k in WRAPPERS if isinstance(loaded.get(k), Mapping)), loaded)
    if not isinstance(loaded, Mapping):
        return {}
    result: dict[str, torch.Tensor] = {}
    for name, value in loaded.items():
        # Training checkpoints hold counters and optimizer states beside the weights.
        if isinstance(name, str) and isinstance(value, torch.Tensor):
            result[unprefixed(name)] = value.detach()
    return result
