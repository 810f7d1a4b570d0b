"""Pickled checkpoints (.bin, .pth, .pt, .ckpt), only ever read with ``weights_only=True`` (invariant I7)."""

from __future__ import annotations

import argparse
import pickle
import pickletools
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normconvert.errors import InputError, first_line
from normconvert.files.placeholders import without_objects
from normconvert.files.tensor_info import check_name

if TYPE_CHECKING:
    import torch

# Training checkpoints wrap the weights. Within each kind the order is timm's (timm.models._helpers.load_state_dict),
# and as there the averaged ones go first; then what others call them (BasicSR, DINO, a teacher being an average).
AVERAGED = ("state_dict_ema", "model_ema", "params_ema", "ema_state_dict", "ema", "teacher")
TRAINED = ("state_dict", "model", "model_state_dict", "params", "net", "student")
SETS = {"ema": AVERAGED, "model": TRAINED}
"""What ``--weights`` may ask for (:data:`normconvert.options.SETS`) -> the entries that hold it."""
DEEPEST = 3
"""Entries inside entries in which weights are looked for."""
ARGUMENTS = ("args", "hparams", "hyper_parameters", "config")
"""Entries that say how a model was made and trained."""
LIGHTNING = "pytorch-lightning_version"
"""The entry by which a checkpoint of Lightning is known: it keeps the arguments of a model, objects or not."""
ALLOWED = ("torch.", "collections.OrderedDict", "argparse.Namespace")
"""Names that are no reason for a refusal, and not worth telling of."""
INFLATED = 4
"""Times its own size that a file may be unpacked: torch writes without compression, so a checkpoint is never more."""
SMALL = 1 << 24
"""Bytes that are harmless whatever they are made of."""


@dataclass(frozen=True)
class Pickled:
    """The weights of a pickle.

    Attributes:
        tensors: name in the file -> value.
        notes: which of several sets of weights these are, and what else in the file was left out.
    """

    tensors: dict[str, torch.Tensor]
    notes: tuple[str, ...] = ()


def read_pickle(path: Path, weights: str | None = None) -> Pickled:
    """The tensors of a pickled checkpoint, mapped from the file where the format allows it.

    Args:
        path: the file.
        weights: ``ema`` or ``model``: which of the sets that a checkpoint of training holds; None: the averaged ones
            where there are any, as timm takes them.

    Raises:
        InputError: the pickle wants to run code, the file is no checkpoint, lacks the set that is asked for, or would
            be far larger in memory.
    """
    loaded, left_out = _read(path)
    sets = dict(_sets(loaded, DEEPEST))
    plain = _tensors(loaded)
    if weights == "ema" and not _of(sets, "ema"):
        held = ", ".join(sets) or "one set, under no name"
        raise InputError(f"{path}: --weights ema: it holds no averaged weights ({', '.join(AVERAGED)}): found {held}")
    chosen = _of(sets, weights) if weights else [*_of(sets, "ema"), *_of(sets, "model")]
    if weights == "model" and not chosen and (sets or not plain):
        raise InputError(f"{path}: --weights model: it holds no trained weights ({', '.join(TRAINED)})")
    if not chosen and not plain:
        raise InputError(f"{path}: holds no tensors: expected a state dict, found {type(loaded).__name__}")
    tensors = sets[chosen[0]] if chosen else plain
    for name, value in tensors.items():
        check_name(path, name)
        _refuse_expanded(path, name, value)
    notes = tuple(note for note in (_choice(sets, chosen), left_out) if note)
    return Pickled({name: value.detach() for name, value in tensors.items()}, notes)


def _of(sets: Mapping[str, Any], kind: str) -> list[str]:
    """The sets of a kind, in the order of :data:`SETS`; an entry inside another counts as what the inner one is."""
    return [name for key in SETS[kind] for name in sets if _kind(name) == kind and key in name.split(".")]


def _kind(name: str) -> str:
    return "ema" if set(AVERAGED) & set(name.split(".")) else "model"


def _choice(sets: Mapping[str, Any], chosen: list[str]) -> str:
    """What to say where there was a choice."""
    if len(sets) < 2:
        return ""
    taken, others = chosen[0], [name for name in sets if name != chosen[0]]
    words = {"ema": "averaged", "model": "trained"}
    other = next((name for name in others if _kind(name) != _kind(taken)), None)
    how = f"; --weights {_kind(other)} takes {other}" if other is not None else ""
    return f"of the weights in {' and '.join(sets)}, {taken} ({words[_kind(taken)]}) is taken{how}"


def read_pickle_entries(path: Path) -> dict[str, str]:
    """The texts that lie beside the weights (``arch``, ``args.model``): name -> text.

    Raises:
        InputError: as :func:`read_pickle`.
    """
    loaded, _ = _read(path)
    if not isinstance(loaded, Mapping):
        return {}
    found = {str(key): value for key, value in loaded.items() if isinstance(value, str)}
    for key in ARGUMENTS:
        found.update({f"{key}.{name}": text for name, text in _arguments(loaded, key).items() if isinstance(text, str)})
    return found


def read_training_arguments(path: Path) -> dict[str, Any]:
    """The ``args`` that timm's ``train.py`` keeps beside the weights; empty if there are none.

    Raises:
        InputError: as :func:`read_pickle`.
    """
    loaded, _ = _read(path)
    return _arguments(loaded, "args") if isinstance(loaded, Mapping) else {}


def read_plain_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a pickle that is one, or a mapping of them; no wrapping is looked through.

    Raises:
        InputError: as :func:`read_pickle`.
    """
    import torch

    loaded, _ = _read(path)
    tensors = {"tensor": loaded} if isinstance(loaded, torch.Tensor) else _tensors(loaded)
    for name, value in tensors.items():
        _refuse_expanded(path, name, value)
    return {name: value.detach() for name, value in tensors.items()}


def _arguments(loaded: Mapping[Any, Any], key: str) -> dict[str, Any]:
    value = loaded.get(key)
    inner = vars(value) if isinstance(value, argparse.Namespace) else value
    return {str(name): one for name, one in inner.items()} if isinstance(inner, Mapping) else {}


def _read(path: Path) -> tuple[Any, str]:
    """What a pickle holds, and a sentence about the objects in it that were left out."""
    if path.stat().st_size == 0:
        raise InputError(f"{path}: the file is empty; download it again")
    _refuse_inflated(path)
    try:
        try:
            return _load(path), ""
        except pickle.UnpicklingError:
            names = _unknown(path)
            loaded = without_objects(names, lambda: _load(path)) if names else None
            if not (isinstance(loaded, Mapping) and isinstance(loaded.get(LIGHTNING), str)):
                raise
            told = ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
            return (
                loaded,
                f"a checkpoint of Lightning: the objects in it ({told}) were not loaded, and none of their code",
            )
    # The first of these: it is what weights_only raises, and all others say no more than that the file is broken.
    except pickle.UnpicklingError as error:
        raise InputError(_refusal(path)) from error
    except (OSError, RuntimeError) as error:  # of a file that ends early; torch's own text is a paragraph
        raise InputError(f"{path}: not a PyTorch checkpoint, or truncated; download it again") from error
    # The bytes decide what an unpickler runs into: no list of exceptions would be complete.
    except Exception as error:
        raise InputError(f"{path}: not a PyTorch checkpoint, or truncated: {first_line(error)}") from error


def _load(path: Path) -> Any:
    import torch

    # timm's training checkpoints hold their argparse.Namespace: plain data, allowed as timm allows it.
    with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice on pickle protocols
        # Mapped if it is a zip file: values stay on the disk until they are used. Older files cannot be.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


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


def _unknown(path: Path) -> list[str]:
    """All globals in a zip file that ``weights_only`` does not know."""
    import torch

    with torch.serialization.safe_globals([argparse.Namespace]), suppress(Exception):
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    return []


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


def _sets(loaded: Any, depth: int) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """The sets of weights below the names that wrap them, ``model`` or ``model.state_dict``."""
    for key in (*AVERAGED, *TRAINED):
        inner = loaded.get(key) if isinstance(loaded, Mapping) else None
        if not isinstance(inner, Mapping):
            continue
        if tensors := _tensors(inner):
            yield key, tensors
        elif depth > 1:
            yield from ((f"{key}.{name}", found) for name, found in _sets(inner, depth - 1))


def _tensors(loaded: Any) -> dict[str, torch.Tensor]:
    """Training checkpoints hold counters and optimizer states beside the weights."""
    import torch

    if not isinstance(loaded, Mapping):
        return {}
    return {n: value for n, value in loaded.items() if isinstance(n, str) and isinstance(value, torch.Tensor)}


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
