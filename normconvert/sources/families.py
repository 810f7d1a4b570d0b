"""The classes that transformers has for one model type, and the Auto classes that open them."""

from __future__ import annotations

from collections import defaultdict


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
