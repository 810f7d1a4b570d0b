"""The form that the weights of a converted folder have, given to the plain architecture."""

from __future__ import annotations

from typing import TYPE_CHECKING

from normconvert.errors import InputError
from normconvert.sources.source import Source

if TYPE_CHECKING:
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
