"""The class of a source and its names, where an outer model may have put a prefix before them.

Lightning keeps a model in an attribute (``model.``), PEFT in two (``base_model.model.``): whatever is saved of the
outer one has that before every name. As part of a name it may be the class's own, so nothing is taken away unless the
names do not fit with it and all that the class needs is there without it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from normconvert.errors import InputError
from normconvert.files.weight_files import Checkpoint, renamed
from normconvert.files.wrapping import prefixes
from normconvert.identification.words import MEANT, few, several_models
from normconvert.sources.libraries import describe, map_names
from normconvert.sources.source import Source
from normconvert.sources.tensor_names import DoesNotFit

Attach = Callable[[Source], Source]


def without_prefix(source: Source, prefix: str) -> Source | None:
    """The source with a prefix taken away where names have it; None if two would become one."""
    names = {name: name.removeprefix(prefix) or name for name in source.tensors}
    if len(set(names.values())) < len(names):
        return None
    made = renamed(Checkpoint(source.tensors, source.pickled), names)
    note = f"the tensors' names are taken without {prefix!r}, with which they do not fit"
    return replace(source, tensors=made.tensors, pickled=made.pickled, given=True, notes=(*source.notes, note))


def fitted(source: Source, attach: Attach | None = None) -> Source:
    """The source with its class and its names mapped to those of the model, without a prefix if need be.

    Args:
        source: with neither.
        attach: gives the source what fetches its tensors, before any is read.

    Raises:
        InputError: the names do not fit the class, or no class.
    """
    try:
        return _fitted(source, attach)
    except DoesNotFit:
        fits: dict[str, Source] = {}
        for prefix in prefixes(source.tensors):
            inner = without_prefix(source, prefix) if not prefix.startswith(tuple(fits)) else None
            # What is missing is told of the names as they are in the file. All else that is wrong ends the search:
            # names that fit two classes might fit one of them once more is taken away.
            with suppress(DoesNotFit):
                if inner is not None:
                    fits[prefix] = _fitted(inner, attach)
        if not fits:
            raise
    if len(fits) > 1:
        raise InputError(f"{source.reference}: {several_models(list(fits))}: {MEANT}")
    return next(iter(fits.values()))


def _fitted(source: Source, attach: Attach | None) -> Source:
    source = source if attach is None else attach(source)
    # The names can be mapped only when the class is known, so the source is made in two steps.
    source = describe(source)
    mapping = map_names(source)
    notes = source.notes
    if mapping.strays:
        notes += (f"tensors that {source.architecture} has no place for, copied as they are: {few(mapping.strays)}",)
    return replace(
        source,
        notes=notes,
        name_map=mapping.name_map,
        one_to_one=not mapping.merged,
        buffers=mapping.buffers,
        tied=mapping.tied,
        apart=mapping.apart,
        merged=mapping.merged,
    )
