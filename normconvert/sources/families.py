"""The classes that transformers has for one model type, and the Auto classes that open them."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

from normconvert.compat.transformers import auto_tables, tied_keys
from normconvert.sources.source import Source


def family(model_type: str) -> dict[str, list[str]]:
    """Class name -> the Auto classes that may build it, from transformers' own tables: no model is imported.

    >>> family("opt")["OPTForCausalLM"]
    ['AutoModelForCausalLM']
    """
    found: dict[str, list[str]] = defaultdict(list)
    for auto, table in auto_tables().items():
        names = table.get(model_type, ())
        for name in (names,) if isinstance(names, str) else names:
            found[name].append(auto)
    return dict(found)


def opened_otherwise(source: Source) -> list[str]:
    """The base model and the backbone, which return the model's inside as it is; not the source's own class."""
    found = family(str(source.config.get("model_type")))
    bare = [name for name, autos in found.items() if {"AutoModel", "AutoBackbone"} & set(autos)]
    return [name for name in bare if name != source.architecture]


def tied_to(source: Source, tensors: set[str]) -> dict[str, str]:
    """Classes of the family with a head of their own that is tied to one of ``tensors`` -> that tensor.

    Args:
        source: its own class is left out.
        tensors: names in its class, with the base model's prefix or without.
    """
    import transformers

    found: dict[str, str] = {}
    for name in family(str(source.config.get("model_type"))):
        kind = getattr(transformers, name, None)
        if name == source.architecture:
            continue
        prefix = f"{getattr(kind, 'base_model_prefix', '')}."
        bare = {tensor.removeprefix(prefix) for tensor in tensors}
        table = next(
            (str(table) for table in tied_keys(kind).values() if str(table).removeprefix(prefix) in bare), None
        )
        if table is not None:
            found[name] = table
    return found


def as_class(source: Source, name: str) -> Source:
    """The same files, as another class of the family."""
    return replace(source, architecture=name, config={**source.config, "architectures": [name]})
