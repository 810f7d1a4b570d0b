"""What the libraries, and a file of the user's, do differently, side by side: describe, build, map names, load."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from normconvert.compat.transformers import failures_of_tokenizer
from normconvert.errors import InputError
from normconvert.files.safetensors_file import FLOATING
from normconvert.runtime import one_at_a_time
from normconvert.sources.converted_form import apply_modules
from normconvert.sources.source import Source
from normconvert.sources.stated_sizes import in_proportion
from normconvert.sources.tensor_names import DoesNotFit, missing_names, names_apart, strays, tied_groups

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class Mapping:
    """How checkpoint tensors become model tensors; the attributes as in :class:`Source`.

    ``strays`` are tensors that no part of the model takes.
    """

    name_map: dict[str, str]
    merged: frozenset[str]
    buffers: frozenset[str]
    tied: tuple[tuple[str, ...], ...]
    apart: frozenset[str]
    strays: tuple[str, ...] = ()


@one_at_a_time
def describe(source: Source) -> Source:
    """Fill in ``architecture`` (and, for a bare file, ``config``)."""
    if source.library == "timm":
        from normconvert.sources import timm_models

        return timm_models.describe(source)
    if source.library == "torch":
        from normconvert.sources import factory_models

        return factory_models.describe(source)
    from normconvert.sources import transformers_models, unnamed_class

    if unnamed_class.is_unnamed(source):
        source = unnamed_class.decide(source)
    return transformers_models.describe(source)


@one_at_a_time
def build_skeleton(source: Source) -> nn.Module:
    """See :meth:`Source.skeleton`."""
    import torch

    from normconvert.tracing.constant_buffers import following_integers

    with in_proportion(source.reference, source.tensors), following_integers() as fill:
        if source.library == "timm":
            from normconvert.sources import timm_models

            model = timm_models.build_meta(source)
        elif source.library == "torch":
            from normconvert.sources import factory_models

            model = factory_models.build_meta(source)
        else:
            from normconvert.sources import transformers_models

            model = transformers_models.build_meta(source)
    apply_modules(source, model)
    # The constants afterwards: the move would take their values away again.
    model = model.to(torch.device("meta")).eval()
    fill(model)
    return model


@one_at_a_time
def load_model(source: Source, dtype: torch.dtype) -> nn.Module:
    """See :meth:`Source.load`."""
    if source.library == "timm":
        from normconvert.sources import timm_models

        model, missing = timm_models.load(source, dtype)
    elif source.library == "torch":
        from normconvert.sources import factory_models

        model, missing = factory_models.load(source, dtype)
    else:
        from normconvert.sources import transformers_models

        model, missing = transformers_models.load(source, dtype)
    # The libraries leave what is missing at random values, and at most warn.
    state = model.state_dict()
    _check_missing(source, model, state, set(state) - missing, source.tied)
    return model.eval()


@one_at_a_time
def map_names(source: Source) -> Mapping:
    """Map checkpoint names to the model's, as the library does when it loads.

    Raises:
        InputError: a tensor the model needs is missing, or one has another shape than the model expects, or tensors
            that the model's class makes one differ.
    """
    model = build_skeleton(_with_apart(source))
    # The parameters themselves: what is detached is a new object each time, and ties are seen by identity.
    state = model.state_dict(keep_vars=True)
    declared: dict[str, str] = {}
    buffers = frozenset(name for name, _ in model.named_buffers())
    if source.library == "timm":
        from normconvert.sources import timm_models

        name_map, merged = timm_models.rename(source, state)
    elif source.library == "torch":
        from normconvert.sources import factory_models

        name_map, merged = factory_models.rename(source, state)
    else:
        from normconvert.sources import transformers_models

        # Ties that the class declares count as well, whether they are made on the meta device or not.
        name_map, merged, declared = transformers_models.rename(source, model, state)
    tied = tied_groups(state, declared)
    _check_missing(source, model, state, merged.union(name_map.values()), tied)
    _check_shapes(source, {name: target for name, target in name_map.items() if target not in merged}, state)
    stored = {target: partial(source.read, name) for name, target in name_map.items() if target not in merged}
    try:
        apart, tied = names_apart(tied, declared, stored)
    except ValueError as error:
        raise InputError(f"{source.reference}: {error}") from error
    # A filter of timm's that makes tensors does not say of which.
    unknown = source.library == "timm" and bool(merged)
    unused = () if unknown else tuple(strays(source.tensors.values(), model, name_map.keys()))
    return Mapping(name_map, merged, buffers, tied, apart, unused)


def _with_apart(source: Source) -> Source:
    """A converted folder with the names that are not tied: its edits may give them other shapes than their tables."""
    if source.library != "transformers" or not source.modules:
        return source
    from normconvert.sources import transformers_models

    model = transformers_models.build_meta(source)
    state = model.state_dict(keep_vars=True)
    name_map, merged, declared = transformers_models.rename(source, model, state)
    stored = {target: partial(source.read, name) for name, target in name_map.items() if target not in merged}
    with suppress(ValueError):  # told where all names are looked at
        return replace(source, apart=names_apart(tied_groups(state, declared), declared, stored)[0])
    return source


def _check_missing(
    source: Source,
    model: nn.Module,
    state: dict[str, torch.Tensor],
    found: Iterable[str],
    tied: tuple[tuple[str, ...], ...],
) -> None:
    missing = missing_names(model, state, found, tied)
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise DoesNotFit(
            f"{source.reference}: the weights do not fit {source.architecture}: "
            f"tensors {', '.join(missing[:3])}{more} are missing ({len(state) - len(missing)} of {len(state)} found)"
        )


def _check_shapes(source: Source, name_map: dict[str, str], state: dict[str, torch.Tensor]) -> None:
    for name, target in name_map.items():
        info, expected = source.tensors[name], state[target]
        if info.shape != tuple(expected.shape):
            raise InputError(
                f"{source.reference}: tensor {name} has shape {list(info.shape)}, "
                f"{source.architecture} expects {list(expected.shape)}"
            )
        # Integers and 8-bit floats in place of weights mean something only together with scales that are elsewhere.
        if expected.is_floating_point() and info.dtype not in FLOATING:
            raise InputError(
                f"{source.reference}: tensor {name} is {info.dtype} where {source.architecture} expects floats: "
                "quantised checkpoints are not supported"
            )


@one_at_a_time
def load_tokenizer(source: Source) -> Any | None:
    """See :meth:`Source.tokenizer`."""
    names = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model")
    if source.folder is None or source.library != "transformers":
        return None
    if not any((source.folder / name).is_file() for name in names):
        return None
    from transformers import AutoTokenizer

    # A missing optional package, or a broken file, must not stop a conversion that needs no text.
    with suppress(InputError), failures_of_tokenizer():
        return AutoTokenizer.from_pretrained(
            source.folder, trust_remote_code=source.trust_remote_code, local_files_only=True
        )
    return None


class LibraryModels:
    """What a :class:`Source` is given to make models with, whichever library it is of."""

    skeleton = staticmethod(build_skeleton)
    load = staticmethod(load_model)
    tokenizer = staticmethod(load_tokenizer)
