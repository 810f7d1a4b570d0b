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
from normconvert.files.tensor_info import check_name

if TYPE_CHECKING:
    import torch

# Training checkpoints wrap the weights; the order is timm's (timm.models._helpers.load_state_dict).
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
# One of them twice: what was compiled before it was parallel has it inside, what was compiled after it outside.
PREFIXES = ("_orig_mod.", "module.", "_orig_mod.")
ALLOWED = ("torch.", "collections.OrderedDict", "argparse.Namespace")
"""Names that are no reason for a refusal, and not worth telling of."""
INFLATED = 4
"""Times its own size that a file may be unpacked: torch writes without compression, so a checkpoint is never more."""
SMALL = 1 << 24
"""Bytes that are harmless whatever they are made of."""


def read_pickle(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a pickled checkpoint, mapped from the file where the format allows it.

    Raises:
        InputError: the pickle wants to run code, the file is no checkpoint, or would be far larger in memory.
    """
    loaded = _load(path)
    tensors = _tensors(path, loaded)
    if not tensors:
        raise InputError(f"{path}: holds no tensors: expected a state dict, found {type(loaded).__name__}")
    return tensors


def read_pickle_entries(path: Path) -> dict[str, str]:
    """The texts that lie beside the weights (``arch``, ``args.model``): name -> text.

    Raises:
        InputError: as :func:`read_pickle`.
    """
    loaded = _load(path)
    if not isinstance(loaded, Mapping):
        return {}
    found = {str(key): value for key, value in loaded.items() if isinstance(value, str)}
    for key in ("args", "hparams", "hyper_parameters", "config"):
        value = loaded.get(key)
        inner = vars(value) if isinstance(value, argparse.Namespace) else value
        if isinstance(inner, Mapping):
            found.update({f"{key}.{name}": text for name, text in inner.items() if isinstance(text, str)})
    return found


def _load(path: Path) -> Any:
    import torch

    if path.stat().st_size == 0:
        raise InputError(f"{path}: the file is empty; download it again")
    _refuse_inflated(path)
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
    return loaded


def _refuse_inflated(path: Path) -> None:
    """Refuse a zip file that unpacks to far more than it is, before it does."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise InputError(f"{path}: not a PyTorch checkpoint, or truncated; download it again") from error
    if size > max(SMALL, INFLATED * path.stat().st_size):
        raise InputError(f"{path}: refused: it unpacks to {size} bytes, far more than it is; torch writes none such")


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


def unprefixed(name: str) -> str:
    """A tensor's name without what data parallelism and compilation put before it."""
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _tensors(path: Path, loaded: Any) -> dict[str, torch.Tensor]:
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
            check_name(path, name)
            _refuse_expanded(path, name, value)
            result[unprefixed(name)] = value.detach()
    return result


def _refuse_expanded(path: Path, name: str, value: torch.Tensor) -> None:
    """Refuse a tensor that repeats a few stored values so often that it would not fit into memory once it is one."""
    size = value.numel() * value.element_size()
    if size > SMALL and size > _stored(value):
        raise InputError(f"{path}: refused: tensor {name} {list(value.shape)} is larger than what is stored of it")


def _stored(value: torch.Tensor) -> int:
    try:
        return value.untyped_storage().nbytes()
    except (RuntimeError, NotImplementedError):  # sparse tensors and the like, which have none
        return 0
