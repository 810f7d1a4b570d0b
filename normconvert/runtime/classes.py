"""Model classes of transformers that apply the edits of their config when they are built."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from normconvert.runtime.edits import apply_module_edits
from normconvert.runtime.one_thread import one_at_a_time
from normconvert.runtime.shipping import own_source

CONFIG_KEY = "normconvert"
"""The key of config.json that holds ``{"format", "architecture", "modules"}``."""
REMOTE_FILE = "modeling_normconvert.py"
"""The name of this file inside an output."""
ADAPTER_RECORD = "normconvert_adapter.json"
"""What lies beside an adapter that was converted."""


def edits_for(model: nn.Module, section: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The edits of a config's section as they apply to ``model``, which may be another head on the converted model.

    For another class than the converted one, paths gain or lose the base model's prefix, and norms of absent heads drop
    out. The section's ``classes`` are those for which the conversion was proved: any other may return the stream whose
    mean was removed, or read a table that was changed.

    Raises:
        ValueError: the conversion was not proved for this class.
    """
    edits = [dict(edit) for edit in section["modules"]]
    name, converted = type(model).__name__, section.get("architecture")
    if converted == name:
        return edits
    if name not in section.get("classes", ()):
        raise ValueError(
            f"this checkpoint was converted as {converted} and cannot be loaded as {name}, for which that was not "
            f"proved: convert the original as {name}"
        )
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    present = {path for path, _ in model.named_modules(remove_duplicate=False) if path}
    for edit in edits:
        path = edit["path"]
        edit["path"] = next((p for p in (path, path.removeprefix(prefix), prefix + path) if p in present), None)
    return [edit for edit in edits if edit["path"] is not None]


def warn_of_adapter(model: Any, reference: Any) -> None:
    """Warn of an adapter that was trained on another checkpoint than ``model``, and not converted for it.

    Args:
        model: a converted transformers model.
        reference: a folder or hub id of a PEFT adapter; None: there is nothing to look at.
    """
    from transformers.utils import cached_file

    def file(name: str) -> Any:
        try:
            return cached_file(reference, name)
        except OSError:  # there is none
            return None

    if reference is None or file(ADAPTER_RECORD) is not None or (found := file("adapter_config.json")) is None:
        return
    base = str(json.loads(Path(found).read_text(encoding="utf-8")).get("base_model_name_or_path"))
    own = str(model.name_or_path)
    if Path(base).resolve() != Path(own).resolve():
        warnings.warn(
            f"{reference}: this adapter was trained on {base}, and the model is a converted checkpoint ({own}), on "
            "which it computes something else: convert it with `normconvert adapter`",
            stacklevel=3,
        )


_CLASSES: dict[str, type] = {}


def converted_class(base: type) -> type:
    """The subclass of a transformers model class that applies the edits of its config when it is built.

    It keeps the name of ``base`` and belongs to this module, where pickle finds it again.
    """
    name = base.__name__
    if name in _CLASSES and _CLASSES[name].__mro__[1] is base:
        return _CLASSES[name]

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)  # type: ignore[misc]
        section = getattr(config, CONFIG_KEY)
        apply_module_edits(self, edits_for(self, section))
        if section.get("guard"):
            known = getattr(self, "_keys_to_ignore_on_load_unexpected", None)
            # A list or a set, by release, empty too: transformers joins it with its own of that kind.
            known = [] if known is None else known
            self._keys_to_ignore_on_load_unexpected = type(known)([*known, f"{re.escape(section['guard'])}$"])

    @one_at_a_time
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        return base.from_pretrained.__func__(cls, *args, **kwargs)  # type: ignore[attr-defined]

    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        folder = Path(save_directory)
        if kwargs.get("is_main_process", True) and not folder.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / REMOTE_FILE).write_text(own_source(), encoding="utf-8", newline="\n")
        guard = getattr(self.config, CONFIG_KEY, {}).get("guard")
        if guard:  # a tensor of no elements, which the plain class refuses to load
            state = dict(kwargs.get("state_dict") or self.state_dict())
            kwargs["state_dict"] = {**state, guard: torch.empty(0, dtype=self.dtype)}
        base.save_pretrained(self, save_directory, *args, **kwargs)  # type: ignore[attr-defined]

    def load_adapter(self: Any, peft_model_id: Any = None, *args: Any, **kwargs: Any) -> Any:
        warn_of_adapter(self, peft_model_id)
        return base.load_adapter(self, peft_model_id, *args, **kwargs)  # type: ignore[attr-defined]

    body: dict[str, Any] = {"__module__": __name__, "__qualname__": name, "__doc__": base.__doc__}
    body |= {"__init__": __init__, "save_pretrained": save_pretrained, "load_adapter": load_adapter}
    body["from_pretrained"] = classmethod(from_pretrained)
    # The library answers these by looking at the module that holds the class; the base class's module is the one meant.
    # A class that counts as custom code would be loaded without the library's renaming and merging of weights.
    for method in ("is_custom_code", "_can_set_attn_implementation", "_can_set_experts_implementation"):
        if hasattr(base, method):
            body[method] = staticmethod(getattr(base, method))
    # GenerationMixin among the direct bases keeps the Auto classes from making yet another subclass, unknown to pickle.
    mixin = [kind for kind in base.__mro__ if kind.__name__ == "GenerationMixin"]
    _CLASSES[name] = type(name, (base, *mixin), body)
    return _CLASSES[name]


def __getattr__(name: str) -> Any:
    """``modeling_normconvert.GPT2LMHeadModel``: the converted class of a transformers class."""
    if name in _CLASSES:
        return _CLASSES[name]
    if not name.startswith("_"):
        import transformers

        base = getattr(transformers, name, None)
        if isinstance(base, type) and issubclass(base, transformers.PreTrainedModel):
            return converted_class(base)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
