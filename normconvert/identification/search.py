"""Which architecture is this? Every exact match, or what comes nearest and how it differs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version

from normconvert.files.wrapping import prefixes
from normconvert.identification.model_types import candidates, load_types, nearest_types, search_types
from normconvert.identification.other_libraries import other_library
from normconvert.identification.prints import (
    Fit,
    Index,
    compare,
    is_exact,
    load_index,
    pattern,
    read_print,
    search,
    write_print,
)
from normconvert.identification.reading import Names
from normconvert.identification.result import Candidate, Identification, Near
from normconvert.identification.words import several_models

NEAREST = 3
"""So many kinds of difference are shown."""
FARTHER = 4
"""What differs in so many times more tensors than the nearest does is not near."""
PROVED = 8
"""So many models are built to see whether another image size or number of input channels explains a difference."""


def identify_names(path: str, names: Names, *, prove: bool = True) -> Identification:
    """Find the architectures whose tensors have the names and shapes that have been read.

    Args:
        path: what was read, for the report.
        names: its tensors and what it states.
        prove: models may be built to explain a difference.
    """
    models, notes = known_models(load_index())
    fits = search(names.shapes, names.integers, models)
    exact = [fit for fit in fits if is_exact(fit)]
    if notes and exact:  # the index is of another version of timm
        exact = [fit for fit in exact if _still_fits(fit, names)]
    found = Identification(path, len(names.shapes), stated=names.stated, notes=(*names.notes, *notes))
    if exact:
        return replace(found, exact=tuple(Candidate("timm", fit.name, fit.num_classes) for fit in exact))
    nearest = _grouped(fit for fit in fits if _resembles(fit, names))
    inside = _prefixed(names, models)
    if len(inside) == 1:
        ((prefix, without),) = inside.items()
        which = "all" if all(name.startswith(prefix) for name in names.shapes) else "the"
        note = f"{which} names begin with {prefix!r}: they fit without it"
        types = tuple(Candidate("timm", fit.name, fit.num_classes) for fit in without)
        return replace(found, exact=types, prefix=prefix, notes=(*found.notes, note))
    # Only the first group, since each proof builds models.
    if prove and nearest:
        nearest[0] = _explained(nearest[0], fits, models, names)
    index = load_types()
    kinds = search_types(names.shapes, names.integers, index.rows)
    # These fit exactly: what comes near in timm is of no interest then.
    if types := candidates(kinds):
        return replace(found, exact=types)
    found = replace(found, origin=several_models(list(inside)) if inside else other_library(names.shapes))
    return replace(found, nearest=(*nearest, *nearest_types(kinds, len({pattern(n) for n in names.shapes}), NEAREST)))


def known_models(index: Index) -> tuple[Mapping[str, str], list[str]]:
    """The fingerprints of the models that the installed timm has; those that the index lacks are made now.

    Returns:
        Model name -> lines, and what to say of it: nothing if the index is of the installed timm.
    """
    try:
        installed = version("timm")
    except PackageNotFoundError:
        installed = index.timm
    # The usual case needs no timm and no torch.
    if installed == index.timm:
        return index.models, []
    import timm

    from normconvert.identification.building import timm_print

    models: dict[str, str] = {}
    failed: list[str] = []
    names = timm.list_models()
    new = [name for name in names if name not in index.models]
    for name in names:
        try:
            models[name] = index.models[name] if name in index.models else write_print(timm_print(name))
        except Exception:  # whatever a model that is not known yet raises
            failed.append(name)
    notes = [f"the index is of timm {index.timm}, {installed} is installed: {len(new)} new models were built"]
    if failed:
        notes.append(f"{len(failed)} models of timm {installed} could not be built: {', '.join(failed[:3])}")
    return models, notes


def _still_fits(fit: Fit, names: Names) -> bool:
    from normconvert.identification.building import timm_print

    return is_exact(compare(names.shapes, names.integers, timm_print(fit.name)))


def _resembles(fit: Fit, names: Names) -> bool:
    """Whether more tensors agree than differ."""
    return not is_exact(fit) and len(names.shapes) - len(fit.extra) - len(fit.reshaped) > fit.differences


def _grouped(fits: Iterable[Fit]) -> list[Near]:
    """The nearest architectures; those that differ in the same way together."""
    groups: dict[object, list[Fit]] = {}
    for fit in fits:
        # Variants of one architecture differ from a checkpoint alike, and would fill the list with one answer.
        key = (fit.missing, fit.extra, fit.reshaped)
        if key in groups or len(groups) < NEAREST:
            groups.setdefault(key, []).append(fit)
    near = [
        Near("timm", tuple(f.name for f in group), group[0].missing, group[0].extra, group[0].reshaped)
        for group in groups.values()
    ]
    return [group for group in near if group.differences <= FARTHER * max(near[0].differences, 1)]


def _explained(near: Near, fits: list[Fit], models: Mapping[str, str], names: Names) -> Near:
    """The arguments with which the nearest architectures fit exactly, where some do."""
    from normconvert.identification.arguments import solve

    arguments: dict[str, dict[str, int]] = {}
    for fit in [fit for fit in fits if fit.name in near.names][:PROVED]:
        found = solve(read_print(fit.name, models[fit.name]), fit, names.shapes, names.integers)
        if found is not None:
            arguments[fit.name] = found
    return replace(near, arguments=arguments)


def _prefixed(names: Names, models: Mapping[str, str]) -> dict[str, list[Fit]]:
    """What an outer model has put before the names -> the models that they fit without it."""
    found: dict[str, list[Fit]] = {}
    for prefix in prefixes(names.shapes):
        if prefix.startswith(tuple(found)):
            continue
        shapes = {n.removeprefix(prefix): shape for n, shape in names.shapes.items() if n.startswith(prefix)}
        integers = frozenset(name.removeprefix(prefix) for name in names.integers)
        # Proved like any other: that all names share a word is common.
        if exact := [fit for fit in search(shapes, integers, models) if is_exact(fit)]:
            found[prefix] = exact
    return found
