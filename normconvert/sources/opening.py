"""From what the user typed to a checked :class:`Source`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from normconvert.errors import InputError
from normconvert.files.embedded import demo_folder
from normconvert.files.tensor_info import TensorInfo
from normconvert.files.user_paths import user_path
from normconvert.files.weight_files import (
    LARGEST_TEXT,
    WEIGHT_SUFFIXES,
    Checkpoint,
    adapter_files,
    find_weights,
    inside,
    load_json,
    majority_dtype,
    notes_on,
    read_checkpoint,
    refuse_dangling,
    variant_of,
)
from normconvert.option_fields import check_options
from normconvert.options import Opening
from normconvert.plan.conversion_record import RECORD_FILE, structural_edits
from normconvert.sources.bare_weights import identified, training_arguments
from normconvert.sources.factories import is_factory, refuse_untrusted
from normconvert.sources.gguf import dequantised, gguf_at
from normconvert.sources.hub import HUB_ID, download
from normconvert.sources.source import Source
from normconvert.sources.stated_sizes import check_stated_sizes

Found = Callable[[Iterable[TensorInfo], "Path | None", Sequence[str]], None]
"""Called with the tensors' places, the folder, and sentences: what this is, and which of its weights are taken."""


def open_source(
    reference: str,
    *,
    revision: str | None = None,
    arch: str | None = None,
    variant: str | None = None,
    weights: str | None = None,
    trust_remote_code: bool = False,
    found: Found | None = None,
) -> Source:
    """Open a checkpoint: find its files, check them, and map its tensors to the model's names.

    No weight is read, but for those that the model ties and the files hold under both names: they may differ.

    Args:
        reference: a folder (transformers or timm), a weight file, a hub id (``name``, ``org/name``, ``…@revision``)
            or ``demo:NAME``.
        revision: branch, tag or commit on the hub.
        arch: ``timm:NAME``, the architecture of files that have no config.json, or ``FILE.py:FACTORY``, which makes
            it; None: that whose names and shapes the weights have, if there is one only or the checkpoint states which.
        variant: of the weights in a folder (``fp16``); None: the plain ones, or the only variant.
        weights: ``ema`` or ``model``: which set of a checkpoint of training; None: the averaged one if there is one.
        trust_remote_code: allow code that comes with the checkpoint to run.
        found: called with the tensors' places, the folder and what is known of both as soon as that is so, before the
            library that builds the model is imported, which takes seconds.

    Raises:
        InputError: anything that is wrong with the reference or the files, in one line.
    """
    how = Opening(
        revision=revision, arch=arch, variant=variant, weights=weights, trust_remote_code=trust_remote_code
    )  # fmt: skip
    check_options(how)
    refuse_untrusted(arch, trust_remote_code)
    if reference and (packed := gguf_at(user_path(reference))) is not None:
        return _open_gguf(reference, packed, how, found)
    path, commit = locate(reference, revision, variant)
    if path.is_dir():
        return open_folder(reference, path, commit, how, found)
    if variant is not None:
        raise InputError(f"{path}: --variant {variant} is for folders, and this is a weight file")
    if arch is None and (path.parent / "config.json").is_file():
        if (named := variant_of(path)) is not None:
            return open_folder(reference, path.parent, commit, replace(how, variant=named), found)
        raise InputError(f"{path}: a weight file beside a config.json: pass its folder {path.parent}, or --arch")
    return _finish(reference, None, path, {}, how, None, commit, found)


def _open_gguf(reference: str, packed: Path, how: Opening, found: Found | None) -> Source:
    for name in ("revision", "arch", "variant", "weights"):
        if getattr(how, name) is not None:
            raise InputError(f"{packed}: a GGUF says itself what it is: leave --{name} out")
    folder, note = dequantised(packed)
    source = open_folder(reference, folder, None, replace(how, trust_remote_code=False), found)
    return replace(source, notes=(note, *source.notes))


def open_pair(a: str, b: str, *, trust_remote_code: bool = False) -> tuple[Source, Source]:
    """Open two checkpoints of one model: bare weights take the timm architecture that the other one names.

    Raises:
        InputError: see :func:`open_source`.
    """
    opened: dict[str, Source] = {}  # a checkpoint compared with itself is opened twice, and kept once
    # The one that says what it is comes first, since the other is opened as the same.
    for reference in (b, a) if _is_bare(a) else (a, b):
        other = next(iter(opened.values()), None)
        named = other is not None and other.library == "timm" and _is_bare(reference)
        arch = f"timm:{other.architecture}" if other is not None and named else None
        chosen = recorded_choice(b if reference == a else a)
        opened[reference] = open_source(reference, arch=arch, trust_remote_code=trust_remote_code, **chosen)
    return opened[a], opened[b]


def recorded_choice(converted: str | Path) -> dict[str, Any]:
    """Which of several weights of its source a converted folder was made of: ``variant`` and ``weights``."""
    folder = user_path(converted)
    try:
        said = load_json(inside(folder, RECORD_FILE)).get("options") if (folder / RECORD_FILE).is_file() else None
    except InputError:  # told where the folder itself is opened
        return {}
    found = {name: said.get(name) for name in ("variant", "weights")} if isinstance(said, dict) else {}
    return {name: value for name, value in found.items() if isinstance(value, str)}


def _is_bare(reference: str) -> bool:
    """Whether this is a weight file or folder of this machine that no config.json describes."""
    path = user_path(reference)
    return path.is_file() or (path.is_dir() and not (path / "config.json").is_file())


def locate(reference: str, revision: str | None, variant: str | None = None) -> tuple[Path, str | None]:
    """The folder or file that ``reference`` means, and its commit if it comes from the hub."""
    if reference.startswith("demo:"):
        return demo_folder(reference.removeprefix("demo:")), None
    path = user_path(reference)
    refuse_dangling(path)
    # Before the hub is asked: what is here is meant. An empty reference would be the current folder.
    if reference and path.exists():
        if revision is not None:
            raise InputError(f"{reference}: --revision is for hub ids, but this is a local path")
        if path.is_file() and not path.name.endswith(WEIGHT_SUFFIXES):
            raise InputError(f"{path}: not a checkpoint: expected a folder or a file {', '.join(WEIGHT_SUFFIXES)}")
        return path, None
    return download(*hub_id(reference, revision), variant)


def hub_id(reference: str, revision: str | None) -> tuple[str, str | None]:
    """The name and the revision of ``org/name@revision``.

    Raises:
        InputError: it is no hub id, or names another revision than ``revision``.
    """
    name, _, at = reference.partition("@")
    # A weight file that is not here has a name like a model's, too: nobody is to wait for the hub to say so.
    if not HUB_ID.fullmatch(name) or name.endswith(WEIGHT_SUFFIXES) or (at and revision and at != revision):
        if at and revision:
            raise InputError(f"{reference}: two revisions, {at} and {revision}: give one")
        raise InputError(f"{reference}: no such file or folder, and not a hub id (name or org/name)")
    return name, at or revision


def open_folder(
    reference: str,
    folder: Path,
    commit: str | None,
    how: Opening,
    found: Found | None,
    attach: Callable[[Source], Source] | None = None,
) -> Source:
    """:func:`open_source` for a folder, whatever ``reference`` the user gave, at a ``commit`` of the hub.

    ``attach`` gives the source what fetches its tensors, before any is read.
    """
    config_file, arch = folder / "config.json", how.arch
    # Whoever names an architecture means it, whatever a config.json says.
    config = _read_config(folder) if config_file.is_file() and arch is None else {}
    record = load_json(inside(folder, RECORD_FILE)) if (folder / RECORD_FILE).is_file() else None
    _refuse_large(folder)
    _refuse_adapter(folder)
    _refuse_quantised(folder, config)
    bare = arch is None and not config_file.is_file()
    if bare and record is not None and record.get("library") == "torch":
        made = str(record.get("architecture"))
        raise InputError(f"{folder}: its model is made by {made}: give that file, --arch …/{made} --trust-remote-code")
    if bare and not any(path.name.endswith(WEIGHT_SUFFIXES) for path in folder.iterdir()):
        held = ", ".join(sorted(p.name for p in folder.iterdir())[:4]) or "nothing"
        raise InputError(f"{folder}: not a checkpoint: no config.json and no weights (found {held})")
    weights = find_weights(folder, config, "timm" if bare else library_of(config, arch), how.variant)
    return _finish(reference, folder, weights, config, how, record, commit, found, attach)


class _Config(BaseModel):
    """What is relied upon of a config.json; everything else is the library's to judge."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())
    model_type: str | None = None
    architectures: list[str] | None = None
    architecture: str | None = None
    auto_map: dict[str, Any] | None = None
    normconvert: dict[str, Any] | None = None
    model_args: dict[str, Any] | None = None
    pretrained_cfg: dict[str, Any] | None = None
    transformers_weights: str | None = None


def _read_config(folder: Path) -> dict[str, Any]:
    config = load_json(inside(folder, "config.json"))
    named = config.get("architectures")
    if named is not None and not any(named if isinstance(named, list) else [named]):
        config["architectures"] = None  # [null], "" and the like name none either
    try:
        _Config.model_validate(config)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise InputError(f"{folder / 'config.json'}: not a model's: {place}: {first['msg']}") from error
    return config


def _refuse_adapter(folder: Path) -> None:
    """Refuse a folder whose only weights are those of an adapter."""
    named = adapter_files(folder)
    if not named or any(p.name.endswith(WEIGHT_SUFFIXES) and p.name not in named for p in folder.iterdir()):
        return
    raise InputError(
        f"{folder}: an adapter ({', '.join(named)}), not a model: merge it into its model first and convert that, or "
        "convert the adapter for a converted model with `normconvert adapter`"
    )


def _refuse_large(folder: Path) -> None:
    """Refuse files that the libraries would read whole, and that nobody writes so large."""
    for path in folder.glob("*.json"):
        if path.is_file() and path.stat().st_size > LARGEST_TEXT:
            raise InputError(f"{path}: {path.stat().st_size} bytes: no such file is so large; refused")


def _finish(
    reference: str,
    folder: Path | None,
    weights: Path,
    config: dict[str, Any],
    how: Opening,
    record: dict[str, Any] | None,
    commit: str | None,
    found: Found | None,
    attach: Callable[[Source], Source] | None = None,
) -> Source:
    bare = how.arch is None and not (folder is not None and (folder / "config.json").is_file())
    library = "timm" if bare else library_of(config, how.arch)
    checkpoint = read_checkpoint(weights, how.weights)
    check_stated_sizes(str(folder or weights), config, checkpoint.tensors)
    arch, prefix, notes = how.arch, "", [*notes_on(checkpoint, weights, folder)]
    if bare:
        arch, note, prefix = identified(reference, checkpoint, weights, folder)
        notes.append(note)
    if found is not None:
        stripped = [f"the tensors' names are taken without {prefix!r}"] if prefix else []
        facts = (_what(config, arch, library, checkpoint, weights), *notes, *stripped)
        found(checkpoint.tensors.values(), folder, facts)
    # These import torch, and the libraries.
    from normconvert.sources.fitting import fitted, without_prefix
    from normconvert.sources.libraries import LibraryModels

    try:
        dtype = majority_dtype(checkpoint.tensors)
    except InputError as error:
        raise InputError(f"{weights}: {error}") from error
    source = Source(
        reference=reference, library=library, folder=folder, config=config,
        architecture=(arch or "").removeprefix("timm:"), tensors=checkpoint.tensors, name_map={}, one_to_one=True,
        dtype=dtype, models=LibraryModels(), trust_remote_code=how.trust_remote_code, record=record, revision=commit,
        pickled=checkpoint.pickled, given=_found_by_us(checkpoint, weights, folder),
        training=training_arguments(weights), factory=how.arch if library == "torch" else None,
        modules=structural_edits(folder) if folder is not None else (),
        notes=tuple(notes),
    )  # fmt: skip
    return fitted(without_prefix(source, prefix) or source if prefix else source, attach)


def _what(config: dict[str, Any], arch: str | None, library: str, checkpoint: Checkpoint, weights: Path) -> str:
    """What this is, as config.json, the user or the tensors' names say, and where its weights are."""
    named = config.get("architectures") or [config.get("architecture") or config.get("model_type")]
    name = arch.removeprefix("timm:") if arch is not None else str(named[0])
    tensors = checkpoint.tensors.values()
    files = sorted({tensor.file.name for tensor in tensors}) or [weights.name]
    where = files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
    dtypes = Counter(tensor.dtype for tensor in tensors)
    kinds = ", ".join(sorted(dtypes, key=lambda kind: -dtypes[kind]))
    return f"{name} ({library}), {len(tensors)} tensors ({kinds}) in {where}"


def _found_by_us(checkpoint: Checkpoint, weights: Path, folder: Path | None) -> bool:
    """Whether the library would not find these weights under these names, but others or none."""
    stray = folder is not None and bool(adapter_files(folder))  # transformers would load the adapter's model
    return bool(checkpoint.taken) or stray or (folder is not None and variant_of(weights) is not None)


def library_of(config: dict[str, Any], arch: str | None) -> str:
    """Which library a config.json or ``--arch`` belongs to.

    Raises:
        InputError: neither says.
    """
    if is_factory(arch):
        return "torch"
    if arch is not None:
        if not arch.startswith("timm:") or arch == "timm:":
            raise InputError(f"--arch {arch}: expected timm:NAME, e.g. timm:vit_small_patch16_224, or FILE.py:FACTORY")
        return "timm"
    # Where both are there it is a model of transformers: timm's files have no `model_type`.
    if "architecture" in config and "model_type" not in config:
        return "timm"
    if "model_type" in config or "architectures" in config:
        return "transformers"
    raise InputError("config.json names no architecture: expected model_type (transformers) or architecture (timm)")


def _refuse_quantised(folder: Path, config: dict[str, Any]) -> None:
    # A model of several parts may have one of them quantised.
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        quantisation = part.get("quantization_config")
        if quantisation:
            method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
            raise InputError(
                f"{folder}: quantised checkpoint ({method or 'quantization_config in config.json'}): "
                "convert the original weights, quantise afterwards"
            )
