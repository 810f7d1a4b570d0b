"""Pickled checkpoints (.bin, .pth, .pt, .ckpt), only ever read with ``weights_only=True`` (invariant I7)."""

from __future__ import annotations

import argparse
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
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
SPELLED = re.compile(r"(^|[_-])(ema|swa|averages?|averaged|teacher|shadow)([_-]|$)", re.IGNORECASE)
"""Part of an entry's name by which anybody else's averaged weights are known."""
NO_WEIGHTS = re.compile(r"optim|sched|scaler|rng|loss|metric", re.IGNORECASE)
"""Part of the name of an entry that may hold tensors, and no model's."""
DEEPEST = 3
"""Entries inside entries in which weights are looked for."""
ARGUMENTS = ("args", "hparams", "hyper_parameters", "config")
"""Entries that say how a model was made and trained."""
LIGHTNING = "pytorch-lightning_version"
"""The entry by which a checkpoint of Lightning is known: it keeps the arguments of a model, objects or not."""
PLAIN = ("numpy.", "pathlib.")
"""Whose objects in a checkpoint are numbers and names, such as the best accuracy: left out, like those of Lightning."""
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
    plain = _tensors(loaded)
    sets = _sets(loaded, plain)
    if weights == "ema" and not _of(sets, "ema"):
        held = ", ".join(sets) or "one set, under no name"
        raise InputError(f"{path}: --weights ema: it holds no averaged weights ({', '.join(AVERAGED)}): found {held}")
    chosen = _of(sets, weights) if weights else [*_of(sets, "ema"), *_of(sets, "model")]
    if weights == "model" and not chosen and (sets or not plain):
        raise InputError(f"{path}: --weights model: it holds no trained weights ({', '.join(TRAINED)})")
    if not chosen and not plain:
        raise InputError(
            f"{path}: holds no tensors: expected a state dict, found {_what(loaded)}{left_out and '; '}{left_out}"
        )
    rivals = [name for name in sets if _kind(name) == "model"] if chosen and not _is_known(chosen[0]) else []
    if len(rivals) > 1:
        raise InputError(
            f"{path}: holds {len(rivals)} sets of tensors ({', '.join(rivals)}): save the one that is meant"
        )
    tensors = sets[chosen[0]] if chosen else plain
    for name, value in tensors.items():
        check_name(path, name)
        _refuse_expanded(path, name, value)
    notes = tuple(note for note in (_choice(sets, chosen), left_out) if note)
    return Pickled({name: value.detach() for name, value in tensors.items()}, notes)


def _of(sets: Mapping[str, Any], kind: str) -> list[str]:
    """The sets of a kind, in the order of :data:`SETS`; an entry inside another counts as what the inner one is."""
    ordered = [name for key in SETS[kind] for name in sets if _kind(name) == kind and key in name.split(".")]
    return list(dict.fromkeys([*ordered, *(name for name in sets if _kind(name) == kind)]))


def _kind(name: str) -> str:
    return "ema" if any(part in AVERAGED or SPELLED.search(part) for part in name.split(".")) else "model"


def _is_known(name: str) -> bool:
    return _kind(name) == "ema" or all(part in TRAINED for part in name.split("."))


def _what(loaded: Any) -> str:
    kind = type(loaded).__name__
    return f"{kind} of {', '.join(map(str, list(loaded)[:4]))}" if isinstance(loaded, Mapping) and loaded else kind


def _choice(sets: Mapping[str, Any], chosen: list[str]) -> str:
    """What to say where there was a choice."""
    if len(sets) < 2:
        return "" if all(map(_is_known, sets)) else f"the weights are those under {chosen[0]!r}"
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
            lightning = isinstance(loaded, Mapping) and isinstance(loaded.get(LIGHTNING), str)
            if not lightning and not (names and all(name.startswith(PLAIN) for name in names)):
                raise
            told = ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
            whose = "a checkpoint of Lightning: the" if lightning else "the"
            return loaded, f"{whose} objects in it ({told}) were not loaded, and none of their code"
    # The first of these: it is what weights_only raises, and all others say no more than that the file is broken.
    except pickle.UnpicklingError as error:
        raise InputError(_refusal(path)) from error
    except (OSError, RuntimeError) as error:  # of a file that ends early; torch's own text is a paragraph
        if other := _other_archive(path):
            raise InputError(f"{path}: {other}") from error
        raise InputError(f"{path}: not a PyTorch checkpoint, or truncated; download it again") from error
    # The bytes decide what an unpickler runs into: no list of exceptions would be complete.
    except Exception as error:
        # A KeyError's text is a byte that no pickle has.
        what = "no pickle" if isinstance(error, KeyError) else first_line(error)
        raise InputError(f"{path}: not a PyTorch checkpoint, or truncated: {what}; download it again") from error


def _other_archive(path: Path) -> str:
    """What a zip file of torch is that holds a program in place of a state dict, and what to do; else empty."""
    names: list[str] = []
    with suppress(zipfile.BadZipFile, OSError, ValueError, NotImplementedError), zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    ask = "save the state_dict() of the model that it was made of"
    if any(name.endswith("/constants.pkl") for name in names):
        return f"a TorchScript program, not a state dict: {ask}"
    if any(name.endswith(("serialized_exported_program.json", "models/model.json")) for name in names):
        return f"an exported program (torch.export), not a state dict: {ask}"
    return ""


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


def _sets(loaded: Any, plain: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """The sets of weights below the names that wrap them, ``model`` or ``model.state_dict``.

    Names that nobody is known to use count where there are no others, and no weights beside them.
    """
    found = dict(_below(loaded, DEEPEST))
    known = {name: tensors for name, tensors in found.items() if _is_known(name)}
    trained = any(_kind(name) == "model" for name in known)
    alone = not any(value.ndim and value.is_floating_point() for value in plain.values())
    return known if trained or not alone else found


def _below(loaded: Any, depth: int) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """(entry, tensors) for all mappings of tensors inside others, those of known names first."""
    keys = [key for key in loaded if isinstance(key, str)] if isinstance(loaded, Mapping) else []
    for key in sorted(keys, key=lambda key: (*AVERAGED, *TRAINED, key).index(key)):
        inner, known = loaded[key], key in AVERAGED or key in TRAINED
        if not isinstance(inner, Mapping) or (not known and NO_WEIGHTS.search(key)):
            continue
        if (tensors := _tensors(inner)) and (known or _named(tensors)):
            yield key, tensors
        elif depth > 1:
            yield from ((f"{key}.{name}", found) for name, found in _below(inner, depth - 1))


def _named(tensors: Iterable[str]) -> bool:
    """Whether these are names of a model's tensors, each in a part of it, and not a counter or two."""
    return any("." in name for name in tensors)


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
