"""Pickled checkpoints (.bin, .pth, .pt), only ever read with ``weights_only=True`` (invariant I7)."""

from __future__ import annotations

import argparse
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normconvert.errors import InputError

if TYPE_CHECKING:
    import torch

# Training checkpoints wrap the weights; the order is timm's (timm.models._helpers.load_state_dict).
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
PREFIXES = ("_orig_mod.", "module.", "_orig_mod.")


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
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise InputError(_refusal(path, error)) from error
    except Exception as error:
        raise InputError(f"{path}: not a PyTorch checkpoint, or truncated: {_first_line(error)}") from error
    tensors = _tensors(loaded)
    if not tensors:
        raise InputError(f"{path}: holds no tensors: expected a state dict, found {type(loaded).__name__}")
    return tensors


def _refusal(path: Path, error: Exception) -> str:
    import torch

    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # not a pickle that can be listed
        names = []
    if not names and "Unsupported global" not in str(error) and "GLOBAL" not in str(error):
        return f"{path}: not a PyTorch checkpoint, or truncated: {_first_line(error)}"
    wants = ", ".join(names) or "a global that is not allowed"
    return f"{path}: refused: this pickle wants to run code ({wants}); ask for the weights as safetensors"


def _tensors(loaded: Any) -> dict[str, torch.Tensor]:
    import torch

    if isinstance(loaded, Mapping):
        loaded = next((loaded[k] for k in WRAPPERS if isinstance(loaded.get(k), Mapping)), loaded)
    if not isinstance(loaded, Mapping):
        return {}
    result: dict[str, torch.Tensor] = {}
    for name, value in loaded.items():
        if isinstance(name, str) and isinstance(value, torch.Tensor):
            for prefix in PREFIXES:
                name = name.removeprefix(prefix)
            result[name] = value.detach()
    return result


def _first_line(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    return text or type(error).__name__
