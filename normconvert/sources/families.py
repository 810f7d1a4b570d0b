"""The classes that transformers has for one model type, and the Auto classes that open them."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

from normconvert.sources.source import Source


def family(model_type: str) -> dict[str, list[str]]:
    """Class name -> the Auto classes that may build it, from transformers' own tables: no model is imported.

    >>> family("opt")["OPTForCausalLM"]
    ['AutoModelForCausalLM']
    """
    from transformers.models.auto import modeling_auto

    found: dict[str, list[str]] = defaultdict(list)
    for auto, kind in sorted(vars(modeling_auto).items()):
        # The names behind a lazy mapping, not the mapping: that would import the module of every model it is asked for.
        mapping = getattr(kind, "_model_mapping", None)
        if not auto.startswith("Auto") or mapping is None:
            continue
        names = mapping._model_mapping.get(model_type, ())
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
        ties = getattr(kind, "_tied_weights_keys", None)
        if name == source.architecture or not isinstance(ties, dict):
            continue
        prefix = f"{getattr(kind, 'base_model_prefix', '')}."
        bare = {tensor.removeprefix(prefix) for tensor in tensors}
        table = next((str(table) for table in ties.values() if str(table).removeprefix(prefix) in bare), None)
        if table is not None:
            found[name] = table
    return found


def as_class(source: Source, name: str) -> Source:
    """The same files, as another class of the family."""
    return replace(source, architecture=name, config={**source.config, "architectures": [name]})
