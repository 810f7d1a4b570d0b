"""The class of a transformers checkpoint whose config.json names none: the one whose names its tensors have.

``AutoModel`` would take the base model and leave a head unseen that is tied to the embedding table, for which no tensor
is stored: the table would be changed under the head's feet. The names tell: a head's checkpoint has the base model's
tensors under its prefix, and its own beside them. Where they fit several classes nobody knows which is meant.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from normconvert.errors import InputError
from normconvert.identification.words import few
from normconvert.sources import transformers_models
from normconvert.sources.families import family
from normconvert.sources.source import Source
from normconvert.sources.tensor_names import DoesNotFit, missing_names, strays, tied_groups


@dataclass(frozen=True)
class Fit:
    """How a checkpoint's names fit a class that finds all its tensors in it.

    Attributes:
        name: of the class.
        strays: tensors that the class does not use.
        stripped: names lose the base model's prefix on the way, which no checkpoint of this class has.
    """

    name: str
    strays: int
    stripped: bool


def is_unnamed(source: Source) -> bool:
    """Whether neither config.json nor code that comes with the checkpoint says which class it is."""
    return transformers_models.stated_class(source) is None and not transformers_models.has_own_models(source)


def decide(source: Source) -> Source:
    """The source with the class that its tensors state, and a note of it; unchanged if its type has no classes.

    Raises:
        InputError: they fit several classes, or none.
    """
    classes = family(str(source.config.get("model_type")))
    # A backbone has the base model's tensors: it is another way to open them, and no head.
    names = [name for name, autos in classes.items() if autos != ["AutoBackbone"]]
    if not names:
        return source
    fits = [fit for name in names if (fit := _fit(source, name)) is not None]
    whole = [fit for fit in fits if not fit.strays]
    chosen = [fit for fit in whole if not fit.stripped] or whole
    if len(chosen) == 1:
        name = chosen[0].name
        note = f"config.json names no class (architectures): its tensors are those of {name}, and of no other class"
        return replace(source, architecture=name, notes=(*source.notes, note))
    ask = 'write the one that is meant into config.json, as "architectures": ["NAME"]'
    if chosen:
        which = few([fit.name for fit in chosen])
        raise InputError(
            f"{source.reference}: config.json names no class (architectures), and the tensors' names fit "
            f"{len(chosen)}, which may compute differently: {which}: {ask}"
        )
    raise DoesNotFit(
        f"{source.reference}: config.json names no class (architectures), and the tensors' names fit none of "
        f"{few(names)}: {ask}"
    )


def _fit(source: Source, name: str) -> Fit | None:
    """How the checkpoint fits a class; None if it lacks tensors of it."""
    candidate = replace(source, architecture=name)
    try:
        model = transformers_models.build_meta(candidate)
    except InputError:  # it cannot be ruled out either
        return Fit(name, 0, False)
    state = model.state_dict(keep_vars=True)
    name_map, merged, declared = transformers_models.rename(candidate, model, state)
    if missing_names(model, state, merged.union(name_map.values()), tied_groups(state, declared)):
        return None
    literal, _, _ = transformers_models.rename(candidate, model, state, adapt_prefix=False)
    stripped = any(found not in literal and len(target) < len(found) for found, target in name_map.items())
    return Fit(name, len(strays(source.tensors.values(), model, set(name_map))), stripped)
