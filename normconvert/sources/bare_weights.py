"""What weights that come without a config.json say of their architecture: by their names, or by timm's own word."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from normconvert.errors import InputError
from normconvert.files.pickle_file import read_training_arguments
from normconvert.files.weight_files import PICKLES, Checkpoint
from normconvert.identification import identify_names, names_of, stated, words
from normconvert.identification.reading import architecture

FACTORY = frozenset({
    "checkpoint_path", "cache_dir", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict",
    "pretrained_filter_fn", "model_name",
})  # fmt: skip
"""Arguments of ``timm.create_model`` that make no model, but find weights for it: in other files, or on the hub."""
RENAMED = {"gp": "global_pool", "bn_eps": "bn_eps", "in_chans": "in_chans"}
"""What timm's ``train.py`` calls the arguments of ``timm.create_model`` that change what a model computes."""


def training_arguments(weights: Path) -> Mapping[str, Any]:
    """The ``args`` in a checkpoint of timm's ``train.py``; empty for all others."""
    found = read_training_arguments(weights) if weights.name.endswith(PICKLES) else {}
    return found if isinstance(found.get("model"), str) and {"gp", "bn_eps", "model_kwargs"} & set(found) else {}


def creation(training: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``timm.create_model`` that a training used, but for the model and the number of classes.

    Raises:
        InputError: they are not plain data.
    """
    found = {name: training.get(key) for key, name in RENAMED.items()}
    sizes = training.get("input_size")
    if found["in_chans"] is None and isinstance(sizes, (list, tuple)) and len(sizes) == 3:
        found["in_chans"] = sizes[0]
    more = training.get("model_kwargs") or {}
    if isinstance(more, Mapping) and (named := sorted(FACTORY.intersection(more))):
        raise InputError(f"its args say {named[0]} in model_kwargs, which would load other weights; refused")
    if not isinstance(more, Mapping) or not all(_plain(value) for value in (*more.values(), *found.values())):
        raise InputError(
            "its args (gp, bn_eps, in_chans, model_kwargs) are not plain data, as timm's train.py writes it"
        )
    return {name: value for name, value in {**found, **more}.items() if value is not None}


def _plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_plain, value))
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _plain(one) for key, one in value.items())
    return value is None or isinstance(value, (bool, int, float, str))


def identified(reference: str, checkpoint: Checkpoint, weights: Path, folder: Path | None) -> tuple[str, str, str]:
    """The architecture of weights that come without one, the sentence that tells the user, and a prefix of all names.

    Raises:
        InputError: none fits, or several do and nothing says which.
    """
    names = names_of(checkpoint.tensors, stated(weights, folder))
    # Without building models first: what the file itself says is tried before a hundred others.
    found = identify_names(reference, names, prove=False)
    if found.arch is not None:
        return found.arch, words.used(found), found.prefix
    said = training_arguments(weights).get("model")
    entries = {s.name for s in names.stated if s.where.startswith("entry ")} | ({architecture(said)} if said else set())
    if len(entries) == 1 and _known(name := next(iter(entries))):
        return f"timm:{name}", f"timm:{name}, as the file itself says; --arch overrides that", ""
    found = identify_names(reference, names)
    if found.arch is None:
        raise InputError(words.refused(found))
    return found.arch, words.used(found), found.prefix


def _known(name: str) -> bool:
    import timm

    return bool(timm.is_model(name))
