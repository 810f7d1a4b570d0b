"""Find the weight files of a folder, check them, and list their tensors."""

from __future__ import annotations

import io
import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normconvert.errors import InputError
from normconvert.files.pickle_file import read_pickle
from normconvert.files.safetensors_file import FLOATING, dtype_name, read_header, torch_dtype
from normconvert.files.tensor_info import TensorInfo
from normconvert.files.wrapping import unwrapped

if TYPE_CHECKING:
    import torch

PICKLES = (".bin", ".pth", ".pt", ".pth.tar", ".ckpt", ".pt.tar", ".pyth", ".th")
WEIGHT_SUFFIXES = (".safetensors", *PICKLES)
# In the order the libraries prefer them; transformers first, then timm's further names (timm.models._hub).
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
TIMM_FILES = (
    "pytorch_model.pth",
    "model.pth",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
)
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
OTHER_FORMATS = ("*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.ckpt", "*.npz", "*.ot", "adapter_model.*")


LARGEST_TEXT = 100_000_000
"""Bytes of a config, an index, a record, a model card, a tokenizer's table: the largest known have a third of it."""

# Names that only quantised checkpoints hold: GPTQ/AWQ (packed rows, zero points), bitsandbytes, compressed-tensors.
QUANTISED = re.compile(
    r"\.(qweight|qzeros|g_idx|absmax|quant_map|nested_absmax|SCB|weight_packed|weight_scale|weight_scale_inv|input_scale)$"
    r"|\.quant_state\.|\.weight:qdata$"
)


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a checkpoint: their places, and the values of those that come from pickles.

    Attributes:
        tensors: by their names without what training puts before them (:mod:`normconvert.files.wrapping`).
        pickled: name -> value.
        taken: what was taken out of the names.
        notes: sentences for the user: which of several sets of weights these are, what was left out.
    """

    tensors: dict[str, TensorInfo]
    pickled: dict[str, torch.Tensor] = field(default_factory=dict)
    taken: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def find_weights(folder: Path, config: dict[str, Any], library: str, variant: str | None = None) -> Path:
    """The weight file (or index) that the library would load from ``folder``.

    Args:
        folder: the checkpoint's.
        config: its config.json.
        library: that loads it.
        variant: ``fp16`` for ``model.fp16.safetensors``; None: the plain files, or the only variant.

    Raises:
        InputError: there is none.
    """
    found = _variants(folder)
    if variant is not None:
        if variant not in found:
            held = f"has {', '.join(sorted(found))}" if found else "has none"
            raise InputError(f"{folder}: no weights of the variant {variant!r}: the folder {held}")
        return _linked(folder, found[variant])
    named = config.get("transformers_weights")
    if isinstance(named, str) and library == "transformers":
        # The name is the checkpoint's own, and need not be one of a file beside it.
        return inside(folder, named, "config.json")
    names = WEIGHT_FILES + (TIMM_FILES if library == "timm" else ())
    for name in names:
        if (folder / name).is_symlink() or (folder / name).is_file():
            return _linked(folder, name)
    if len(found) == 1:
        return _linked(folder, next(iter(found.values())))
    if found:
        raise InputError(f"{folder}: weights of the variants {', '.join(sorted(found))}: say which by --variant NAME")
    if library == "timm":
        for suffix in (".safetensors", *PICKLES):
            files = sorted(folder.glob(f"*{suffix}"))
            # As timm does it: a file of any name, as long as there is no choice.
            if len(files) == 1:
                return _linked(folder, files[0].name)
            if files and not any("-of-" in path.name for path in files):
                listed = ", ".join(path.name for path in files[:3]) + (" ..." if len(files) > 3 else "")
                raise InputError(f"{folder}: {len(files)} weight files, {listed}: pass one of them")
    # Only the index says how many there should be: without it one that is missing would go unnoticed.
    shards = sorted(folder.glob("model-*-of-*.safetensors")) + sorted(folder.glob("pytorch_model-*-of-*.bin"))
    if shards:
        raise InputError(f"{folder}: shards such as {shards[0].name} but no index (*.index.json); download it again")
    others = sorted(path.name for pattern in OTHER_FORMATS for path in folder.glob(pattern))
    hint = f"; found only {', '.join(others[:3])}" if others else ""
    raise InputError(f"{folder}: no weights: expected model.safetensors, pytorch_model.bin or an index of shards{hint}")


def _variants(folder: Path) -> dict[str, str]:
    """Variant -> the file or index of its weights, named as transformers names it: before the last ending."""
    found: dict[str, str] = {}
    listed = sorted(path.name for path in folder.iterdir())
    for plain in WEIGHT_FILES:
        stem, _, ending = plain.rpartition(".")
        for name in listed:
            variant = name.removeprefix(f"{stem}.").removesuffix(f".{ending}")
            if f"{stem}.{variant}.{ending}" == name and re.fullmatch(r"(?!.*-of-)[\w-]+", variant):
                found.setdefault(variant, name)
    return found


def adapter_files(folder: Path) -> list[str]:
    """The files of an adapter (PEFT) in a folder."""
    return [name for name in ADAPTER_FILES if (folder / name).is_file()]


def variant_of(weights: Path) -> str | None:
    """The variant that the name of a weight file states: ``fp16`` of ``model.fp16.safetensors``."""
    return next((variant for variant, name in _variants(weights.parent).items() if name == weights.name), None)


def _linked(folder: Path, name: str) -> Path:
    """A weight file; a link that leads nowhere is named, since it would look like a file that is not there."""
    path = folder / name
    refuse_dangling(path)
    return inside(folder, name)


def refuse_dangling(path: Path) -> None:
    """Refuse a link to what is gone.

    Raises:
        InputError: it is one.
    """
    if path.is_symlink() and not path.exists():
        raise InputError(f"{path}: a link that leads nowhere ({os.readlink(path)!r}); download it again")


def is_index(weights: Path) -> bool:
    """Whether this is the index of shards, ``*.index.json`` or that of a variant."""
    return weights.suffix == ".json" and ".index." in weights.name


def read_checkpoint(weights: Path, kind: str | None = None) -> Checkpoint:
    """List the tensors of a weight file or of all the shards of an index.

    Args:
        weights: a .safetensors file, a pickle, or an ``*.index.json``.
        kind: which of several sets of weights of a pickle, see :func:`normconvert.files.pickle_file.read_pickle`.

    Raises:
        InputError: a file is missing, corrupt, quantised, or lies outside the folder.
    """
    checkpoint = _read_index(weights, kind) if is_index(weights) else _read_file(weights, kind)
    if not checkpoint.tensors:
        raise InputError(f"{weights}: holds no tensors")
    if quantised := next((name for name in checkpoint.tensors if QUANTISED.search(name)), None):
        raise InputError(
            f"{weights}: quantised checkpoint (tensor {quantised}): convert the original weights, quantise afterwards"
        )
    names, taken = unwrapped(checkpoint.tensors)
    return replace(renamed(checkpoint, names), taken=taken)


def notes_on(checkpoint: Checkpoint, weights: Path, folder: Path | None) -> tuple[str, ...]:
    """Which weights were taken, where a user may have meant others.

    Args:
        checkpoint: as it was read.
        weights: from this file or index.
        folder: the checkpoint's; None for a bare file.
    """
    found = list(checkpoint.notes)
    if folder is not None and (variant := variant_of(weights)) is not None:
        found.append(f"weights of the variant {variant}: {weights.name}")
    if checkpoint.taken:
        taken = " and ".join(map(repr, checkpoint.taken))
        found.append(f"the tensors' names are taken without {taken}, as training left them")
    if folder is not None and (stray := adapter_files(folder)):
        found.append(
            f"{' and '.join(stray)} beside the model's own weights: these are taken as they are, without the adapter, "
            "and its files are left out (`normconvert adapter` converts one)"
        )
    return tuple(found)


def renamed(checkpoint: Checkpoint, names: Mapping[str, str]) -> Checkpoint:
    """The same tensors under other names, none of which is that of two."""
    tensors = {names[name]: replace(info, name=names[name]) for name, info in checkpoint.tensors.items()}
    return replace(checkpoint, tensors=tensors, pickled={names[n]: value for n, value in checkpoint.pickled.items()})


def _read_file(path: Path, kind: str | None) -> Checkpoint:
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        if kind is not None:
            raise InputError(f"{path}: --weights {kind}: a safetensors file holds one set of weights, without a name")
        return Checkpoint(read_header(path).tensors)
    found = read_pickle(path, kind)
    tensors = {n: TensorInfo(n, path, dtype_name(x.dtype), tuple(x.shape)) for n, x in found.tensors.items()}
    return Checkpoint(tensors, found.tensors, notes=found.notes)


def shards_of(index: Path) -> dict[str, str]:
    """Tensor -> name of its shard; none of these leads out of the folder.

    Raises:
        InputError: it is no index of shards, or names files elsewhere.
    """
    weight_map = load_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise InputError(f"{index}: not an index of shards: expected an object 'weight_map' of file names")
    for name in sorted(set(weight_map.values())):
        inside(index.parent, name, index.name)
    return weight_map


def _read_index(index: Path, kind: str | None) -> Checkpoint:
    weight_map = shards_of(index)
    tensors: dict[str, TensorInfo] = {}
    pickled: dict[str, torch.Tensor] = {}
    # Sorted: the order of an index's entries is nobody's promise, and decides that of the tensors here.
    for name in sorted(set(weight_map.values())):
        shard = index.parent / name
        if not shard.is_file():
            raise InputError(f"{index.parent}: shard {name} is missing (named by {index.name}); download it again")
        found = _read_file(shard, kind)
        # Which of the two is loaded would depend on the order in which a library reads the files.
        if doubled := next((t for t in found.tensors if t in tensors), None):
            raise InputError(f"{shard}: tensor {doubled} is in {tensors[doubled].file.name} as well")
        tensors.update(found.tensors)
        pickled.update(found.pickled)
    # An index that is wrong is a sign of a mixed-up folder, and not to be mended in silence by the output's.
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file.name != Path(file).name:
            raise InputError(f"{index}: tensor {name} is not in {file}, which the index says holds it")
    return Checkpoint(tensors, pickled)


def inside(folder: Path, name: str, said_by: str = "a link") -> Path:
    """``folder / name``.

    Raises:
        InputError: it leaves the folder by name or by link.
    """
    path = folder / name
    # Windows' separator is refused everywhere: a checkpoint is to mean the same on every system.
    escapes = Path(name).is_absolute() or ".." in Path(name).parts or "\\" in name or not name.isprintable()
    if escapes or not leads_inside(folder, path):
        raise InputError(f"{folder}: {said_by} names a file outside the folder: {name!r}; refused")
    return path


def leads_inside(folder: Path, path: Path) -> bool:
    """Whether what ``path`` leads to belongs to the checkpoint in ``folder``, by all links on the way.

    That is the folder itself, or what the hub's cache keeps of this model: there every file is a link.
    """
    try:
        home = folder.resolve(strict=True)
        # By the form of the cache, and no further than it: a folder from anywhere may call itself `snapshots`.
        if home.parent.name == "snapshots" and home.parent.parent.name.startswith("models--"):
            home = home.parent.parent
        return path.resolve().is_relative_to(home)
    except (OSError, RuntimeError, ValueError):  # a circle of links; a name that no file can have
        return False


def load_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        InputError: not readable, far larger than such files are, not JSON, or not an object.
    """
    try:
        data = json.loads(read_text(path))
    except RecursionError as error:
        raise InputError(f"{path}: not valid JSON: nested too deeply") from error
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data


def read_text(path: Path) -> str:
    """The text of a file that describes a checkpoint.

    Raises:
        InputError: it cannot be read, is no text, or is far larger than such files are.
    """
    try:
        size = path.stat().st_size
        if size <= LARGEST_TEXT:
            # No more of it is read either: a device has no size, and no end.
            with path.open("rb") as file:
                data = file.read(LARGEST_TEXT + 1)
            size = max(size, len(data))
        if size > LARGEST_TEXT:
            raise InputError(f"{path}: {size} bytes, more than {LARGEST_TEXT}: no such file is so large; refused")
        return io.TextIOWrapper(io.BytesIO(data), encoding="utf-8").read()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a text file (expected UTF-8)") from error


def majority_dtype(tensors: dict[str, TensorInfo]) -> torch.dtype:
    """The floating dtype that most elements have.

    Raises:
        InputError: no tensor is floating.
    """
    counts: Counter[str] = Counter()
    for info in tensors.values():
        if info.dtype in FLOATING:
            elements = 1
            for n in info.shape:
                elements *= n
            counts[info.dtype] += elements
    if not counts:
        found = ", ".join(sorted({info.dtype for info in tensors.values()}))
        raise InputError(f"no floating tensors (found {found}): quantised checkpoints are not supported")
    # By elements, not by tensors: norms in float32 do not make a half-precision model one of float32.
    return torch_dtype(counts.most_common(1)[0][0])
