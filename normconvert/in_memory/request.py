"""What the conversion of a model in memory is asked: its options, each defined once. Nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, MISSING, dataclass, fields
from typing import Any, Literal

from normconvert.option_fields import option
from normconvert.options import EXAMPLE, LEVEL, METHOD, METHODS, Network, Options, Stage


@dataclass(frozen=True)
class ModelConversion(Options):
    """What :func:`normconvert.convert_model` is asked.

    Attributes:
        stage: called with each stage's name as it begins.
    """

    model: Network = option(MISSING, "A ``torch.nn.Module`` with its weights, on any one device.", model=True)
    method: str = option("rmsnorm", f"The conversion: {METHOD}.", choices=tuple(METHODS))
    _: KW_ONLY
    example_inputs: Any = option(None, EXAMPLE)
    inplace: bool = option(False, "Change ``model`` itself, as a whole or not at all; else a copy of it.")
    verify: str | Literal[False] | None = option("standard", f"{LEVEL} None or False verifies nothing.")
    require_all: bool = option(False, "Refuse unless every norm can be converted.")
    limits: Mapping[str, float] | None = option(
        None, "Figure of the verification and its limit, narrower than what every conversion is held to."
    )
    stage: Stage | None = None

    @property
    def allowed(self) -> Options:
        """What the conversion is allowed to do."""
        return Options(**{one.name: getattr(self, one.name) for one in fields(Options)})
