"""Which tensor goes into which output file, decided before anything is written."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from normconvert.errors import InputError
from normconvert.files.safetensors_file import DTYPES, FLOATING, read_header, torch_dtype, write_header
from normconvert.plan.conversion_plan import Plan
from normconvert.plan.edits import Edit, edited_shape, limited, referred
from normconvert.sources import Source

PICKLE_SHARD = 5 * 10**9  # the shard size for sources that are pickles; safetensors keep theirs
SINGLE = "model.safetensors"


@dataclass(frozen=True)
class OutTensor:
    """One tensor to be written.

    Attributes:
        name: its name in the output.
        origin: checkpoint name of the source tensor its value starts from.
        dtype: safetensors dtype name it is stored in.
        shape: its shape.
        edits: what is done to it first; empty: copied.
    """

    name: str
    origin: str
    dtype: str
    shape: tuple[int, ...]
    edits: tuple[Edit, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * DTYPES[self.dtype][0]


@dataclass(frozen=True)
class OutFile:
    """One safetensors file to be written: its header and its tensors in order."""

    name: str
    header: bytes
    tensors: tuple[OutTensor, ...]

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return len(self.header) + sum(t.nbytes for t in self.tensors)


@dataclass(frozen=True)
class Layout:
    """All output files, and the index that names them if they are shards.

    Attributes:
        files: in the order they are written.
        index: (file name, data) of the index; None for a single file.
        origins: model name -> checkpoint name that holds its source value, for look-ups.
        notes: sentences for the user.
    """

    files: tuple[OutFile, ...]
    index: tuple[str, dict[str, Any]] | None
    origins: Mapping[str, str]
    notes: tuple[str, ...] = ()


def can_stream(source: Source, plan: Plan) -> bool:
    """Whether no tensor that the plan edits or reads is one that the library makes by merging or splitting."""
    if source.one_to_one:
        return True
    names = {*plan.tensors, *(name for group in plan.aliases.values() for name in group)}
    names |= {name for rows in plan.tensors.values() for row in rows for name in referred(row)}
    # What the library merges may stay in the files as it is, as long as the plan neither edits nor reads it.
    return not source.is_pickle and not names & source.merged and names <= set(origins_of(source, plan))


def origins_of(source: Source, plan: Plan) -> dict[str, str]:
    """Model name -> checkpoint name, through tied names where the files hold another one of a group."""
    plain = {name: target for name, target in source.name_map.items() if target not in source.merged}
    # Backwards, so that of several names for one target the first in the files stays.
    origins = {target: name for name, target in reversed(plain.items())}
    groups = [*source.tied, *([key, *names] for key, names in plan.aliases.items())]
    for group in groups:
        held = next((origins[name] for name in group if name in origins), None)
        if held is not None:
            for name in group:
                # A name that the files hold for itself keeps its own value.
                origins.setdefault(name, held)
    return origins


def make_layout(source: Source, plan: Plan, dtype: torch.dtype | None, max_shard_size: int | None) -> Layout:
    """Decide the output files for ``plan``.

    Raises:
        InputError: the plan names a tensor that the checkpoint does not hold.
    """
    origins = origins_of(source, plan)

    # In the dtype that the tensor will be stored in, not the one it has: --dtype float16 ends at 65504.
    def limit(name: str) -> float:
        stored = source.tensors[origins[name]].dtype
        return torch.finfo(dtype if dtype is not None and stored in FLOATING else torch_dtype(stored)).max

    rows_of = {name: limited(rows, limit) for name, rows in plan.tensors.items()}
    edits, new = _edits_by_checkpoint_name(source, rows_of, plan.aliases, origins)
    notes: list[str] = []
    removed = set(plan.removed)
    guard = plan.guard if source.library == "transformers" else None
    tensors = [
        _out_tensor(source, origins, name, name, edits.get(name, ()), dtype)
        for name in source.tensors
        if source.name_map.get(name) not in removed
    ]
    tensors += [
        # The guard: a name with no elements, which the plain class refuses.
        OutTensor(name, name, source.tensors[name].dtype, (0,), ())
        for name, target in source.name_map.items()
        if guard is not None and target == guard
    ]
    # Safetensors stay as they are, tied names and all; of a pickle each name would become a copy.
    if source.is_pickle:
        tensors = _without_tied_copies(source, tensors, notes)
    shards = _shards(source, tensors, max_shard_size, notes)
    for name in new:
        if name not in origins:
            raise InputError(f"the plan edits tensor {name}, which {source.reference} does not hold")
        rows = rows_of.get(name, ())
        origin = next((origins[e["from"]] for e in rows if e["op"] == "copy" and e["from"] in origins), origins[name])
        if rows and rows[0]["op"] == "copy" and rows[0]["from"] in origins:
            rows = rows[1:]  # what is read is already what is copied
        like = next((str(e["like"]) for e in rows if e["op"] == "new"), None)
        stored = name if like is None else _beside(origin, like, name)
        tensor = _out_tensor(source, origins, stored, origin, rows, dtype)
        # A bias stands beside its weight, so that a shard is complete in itself.
        home = next((members for _, members in shards if origin in {t.origin for t in members}), shards[-1][1])
        (home if like is not None else shards[-1][1]).append(tensor)
    files = tuple(_out_file(source, name, members) for name, members in shards)
    return Layout(files, _index(source, files), origins, tuple(notes))


def _beside(origin: str, like: str, name: str) -> str:
    """The checkpoint name of a new tensor: as its model name differs from that of the tensor beside it."""
    # Names are compared from their ends: there a checkpoint and the model say the same.
    while origin and like and origin.rpartition(".")[2] == like.rpartition(".")[2]:
        origin, like = origin.rpartition(".")[0], like.rpartition(".")[0]
    # What is left are the two names' different beginnings, such as a base model's prefix.
    return f"{origin}.{name.removeprefix(like).lstrip('.')}".lstrip(".") if name.startswith(like) else name


def _edits_by_checkpoint_name(
    source: Source,
    tensors: Mapping[str, tuple[Edit, ...]],
    aliases: Mapping[str, Sequence[str]],
    origins: dict[str, str],
) -> tuple[dict[str, tuple[Edit, ...]], list[str]]:
    """The plan in checkpoint names, and the model names of tensors that the files do not hold yet."""
    held: dict[str, list[str]] = {}
    for name, target in source.name_map.items():
        held.setdefault(target, []).append(name)
    edits: dict[str, tuple[Edit, ...]] = {}
    new: list[str] = []
    for target, rows in tensors.items():
        # Files may hold a tied tensor under several names, and a library takes any of them: all get the edits.
        names = dict.fromkeys(n for alias in (target, *aliases.get(target, ())) for n in held.get(alias, ()))
        for name in names:
            edits[name] = rows
        if not names:
            new.append(target)
            for row in rows:  # an untied copy takes its value from another tensor, a new one its place and dtype
                origin = row.get("from") if row["op"] == "copy" else row.get("like") if row["op"] == "new" else None
                if origin in origins:
                    origins.setdefault(target, origins[origin])
    # Files may hold a tied tensor by the name alone that a copy takes now: what the copy leaves needs another.
    copies = {name for name, rows in tensors.items() if rows and rows[0]["op"] == "copy"}
    for table in dict.fromkeys(tensors[name][0]["from"] for name in copies):
        group = next((names for names in source.tied if table in names), (table,))
        if table not in tensors and not any(name in held for name in group if name not in copies):
            new.append(table)
    return edits, new


def _out_tensor(
    source: Source,
    origins: Mapping[str, str],
    name: str,
    origin: str,
    edits: Sequence[Edit],
    dtype: torch.dtype | None,
) -> OutTensor:
    from normconvert.files.safetensors_file import dtype_name

    info = source.tensors[origin]
    stored = dtype_name(dtype) if dtype is not None and info.dtype in FLOATING else info.dtype
    shape = info.shape
    if edits:
        if info.dtype not in FLOATING:
            raise InputError(f"the plan edits tensor {name}, which is {info.dtype}, not floating")
        # Headers come before the data in the files: the shape has to be known before a value is computed.
        shape = _edited_shape(source, origins, shape, edits)
    return OutTensor(name, origin, stored, shape, tuple(edits))


def _edited_shape(
    source: Source, origins: Mapping[str, str], shape: tuple[int, ...], edits: Sequence[Edit]
) -> tuple[int, ...]:
    def shape_of(name: str) -> tuple[int, ...]:
        if name not in origins:
            raise InputError(f"the plan reads tensor {name}, which {source.reference} does not hold")
        return source.tensors[origins[name]].shape

    try:
        return edited_shape(shape, edits, shape_of)
    except (ValueError, RuntimeError, IndexError, KeyError) as error:
        raise InputError(f"the plan does not fit the checkpoint: {error} ({list(edits)} on {list(shape)})") from error


def _without_tied_copies(source: Source, tensors: list[OutTensor], notes: list[str]) -> list[OutTensor]:
    """Pickles hold tied tensors under all their names; safetensors hold one, and the library ties the others."""
    kept: list[OutTensor] = []
    group_of = {name: i for i, group in enumerate(source.tied) for name in group}
    seen: dict[tuple[int, int], OutTensor] = {}
    for tensor in tensors:
        group = group_of.get(source.name_map.get(tensor.name, ""))
        # Tied in the model and one memory in the file: either alone is no proof that the values are the same.
        value = source.pickled[tensor.name]
        key = (group if group is not None else -1, value.data_ptr())
        twin = seen.get(key)
        if group is not None and twin is not None and (twin.shape, twin.edits) == (tensor.shape, tensor.edits):
            notes.append(f"{tensor.name} is tied to {twin.name} and is stored once")
            continue
        seen[key] = tensor
        kept.append(tensor)
    return kept


def _shards(
    source: Source, tensors: list[OutTensor], limit: int | None, notes: list[str]
) -> list[tuple[str, list[OutTensor]]]:
    if limit is None and not source.is_pickle:
        shards: dict[str, list[OutTensor]] = {}
        for tensor in tensors:
            shards.setdefault(source.tensors[tensor.name].file.name, []).append(tensor)
        # Without an index a library finds the weights by their name alone.
        if len(shards) == 1 and not _indexed(source):  # a bare file, or a name only this library knows
            keep = source.folder is not None and "transformers_weights" in source.config
            return [(next(iter(shards)) if keep else SINGLE, tensors)]
        return list(shards.items())
    if source.library == "timm":
        if limit is not None and sum(t.nbytes for t in tensors) > limit:
            notes.append("timm reads one weight file only: --max-shard-size has no effect")
        return [(SINGLE, tensors)]
    groups: list[list[OutTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        # A tensor above the limit gets a shard for itself: none is ever cut.
        if groups[-1] and filled + tensor.nbytes > (limit or PICKLE_SHARD):
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.nbytes
    if len(groups) == 1:
        return [(SINGLE, groups[0])]
    return [(f"model-{i:05d}-of-{len(groups):05d}.safetensors", group) for i, group in enumerate(groups, 1)]


def _indexed(source: Source) -> bool:
    return (
        source.folder is not None
        and (source.folder / f"{SINGLE}.index.json").is_file()
        # A single file goes before an index in the libraries' order: the index beside it says nothing.
        and not (source.folder / SINGLE).is_file()
    )


def _out_file(source: Source, name: str, tensors: list[OutTensor]) -> OutFile:
    """Keep the source's header bytes where they still say the truth, else write a new header with its metadata."""
    metadata = {"format": "pt"}
    if not source.is_pickle and tensors:
        info = source.tensors[tensors[0].origin]
        header = read_header(info.file)
        metadata = header.metadata or metadata
        # As lists: the places in the file follow from the order.
        same = [(t.name, t.dtype, t.shape) for t in tensors] == [
            (i.name, i.dtype, i.shape) for i in header.tensors.values()
        ]
        if same:
            return OutFile(name, header.raw, tuple(tensors))
    return OutFile(name, write_header([(t.name, t.dtype, t.shape) for t in tensors], metadata), tuple(tensors))


def _index(source: Source, files: Sequence[OutFile]) -> tuple[str, dict[str, Any]] | None:
    if len(files) == 1 and not _indexed(source):
        return None
    old: dict[str, Any] = {}
    if source.folder is not None and _indexed(source):
        old = json.loads((source.folder / f"{SINGLE}.index.json").read_text(encoding="utf-8"))
    metadata = {**(old.get("metadata") or {}), "total_size": sum(t.nbytes for f in files for t in f.tensors)}
    weight_map = {t.name: f.name for f in files for t in f.tensors}
    return f"{SINGLE}.index.json", {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}


def index_bytes(source: Source, index: tuple[str, dict[str, Any]]) -> bytes:
    """The index file: the source's own bytes where nothing changed."""
    name, data = index
    path: Path | None = source.folder / name if source.folder is not None and _indexed(source) else None
    if path is not None:
        raw = path.read_bytes()
        # Compared as data, kept as bytes: an index that is still true comes out with its own spelling.
        if json.loads(raw).get("weight_map") == data["weight_map"]:
            old_total = (json.loads(raw).get("metadata") or {}).get("total_size")
            if old_total == data["metadata"]["total_size"]:
                return raw
    return (json.dumps(data, indent=2, sort_keys=True) + "\n").encode()
