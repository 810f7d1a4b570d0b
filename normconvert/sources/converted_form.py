"""The form that the weights of a converted folder have, given to the plain architecture."""

from __future__ import annotations

from typing import TYPE_CHECKING

from normconvert.errors import InputError
from normconvert.sources.source import Source

if TYPE_CHECKING:
    import torch
    from torch import nn


def apply_modules(source: Source, model: nn.Module) -> None:
    """Give the plain architecture the form that the weights of a converted folder have.

    Raises:
        InputError: the edits are another model's.
    """
    from normconvert.runtime import apply_module_edits

    try:
        apply_module_edits(model, source.modules)
    except (ValueError, AttributeError) as error:
        raise InputError(f"{source.reference}: {error}") from error


def load_weights(source: Source, model: nn.Module, dtype: torch.dtype, who: str) -> tuple[nn.Module, set[str]]:
    """The model with the source's weights, in ``dtype``; and the names of its ``state_dict`` that had none.

    Raises:
        InputError: they do not fit; ``who`` cannot load them.
    """
    # Before the weights, which have the shapes that these edits give.
    apply_modules(source, model)
    model = model.to(dtype)
    weights = {target: source.read(name) for name, target in source.name_map.items()}
    try:
        missing = model.load_state_dict(weights, strict=False).missing_keys
    except RuntimeError as error:
        raise InputError(f"{source.reference}: {who} cannot load it: {str(error).splitlines()[-1].strip()}") from error
    return model, set(missing)
