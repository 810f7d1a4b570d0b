"""At least one variant of every timm module, as small as its arguments allow.

Which variants is a table, ``timm_variants.json``, since finding the smallest of 1,400 models takes minutes. For each
norm that a conversion looks for: of every module the smallest model that bears it, for each family the module holds
(``mixer`` and ``gmlp`` of ``mlp_mixer``); for LayerNorm the smallest model of the module, too, whatever it bears.
``python -m tools.census.zoo.timm_zoo`` writes it anew for the timm that is installed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

from tools.census.zoo.case import Case, Skipped, make_case

TABLE = Path(__file__).with_name("timm_variants.json")

ARGUMENTS: tuple[dict[str, Any], ...] = (
    {"depth": 2, "embed_dim": 48, "num_heads": 3},
    {"depth": 2},
    {"num_layers": 2},
    {"depths": (1, 1, 2, 1)},
    {"depths": (1, 2, 1)},
    {"layers": (1, 1, 2, 1)},
    {"stages": (1, 1, 2, 1)},
    {},
)
"""Constructor arguments that cut the depth (and a plain vision transformer's width); the first that builds wins."""

DEFAULT_CLASSES = 11

VARIANTS = {"LayerNorm": "variants", "BatchNorm": "batchnorm_variants"}
"""Norm -> its table in the file."""


def timm_table(norm: str = "LayerNorm") -> dict[str, list[str]]:
    """Module -> variants to sweep for a norm, ``LayerNorm`` or ``BatchNorm``."""
    table: dict[str, list[str]] = json.loads(TABLE.read_text())[VARIANTS[norm]]
    return table


def timm_names(norm: str = "LayerNorm") -> list[str]:
    """All variants of the table, one of every module first: a sweep that is stopped has seen all modules soonest."""
    table = list(timm_table(norm).values())
    return [names[n] for n in range(max(map(len, table))) for names in table if n < len(names)]


def timm_case(name: str, first_level: int = 0) -> tuple[Case, int]:
    """The smallest build of one timm model.

    Args:
        name: a timm model name.
        first_level: index into the ways of building to begin at (see ``levels``).

    Returns:
        The case, and the index of the way it was built.

    Raises:
        Skipped: nothing builds, or the model is too large.
    """
    reason = Skipped("nothing builds")
    for index, (arguments, side) in enumerate(levels(name)):
        if index < first_level:
            continue
        try:
            return make_case(name, "timm", label(arguments, side), constructor(name, arguments, side)), index
        except Skipped as error:
            reason = error
        except Exception as error:  # any library error: the next way may do
            reason = Skipped(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:160])
    raise reason


def levels(name: str) -> list[tuple[dict[str, Any], int | None]]:
    """Arguments and image side, from the smallest build to the default one."""
    import timm

    config = timm.get_pretrained_cfg(name)
    size = config.input_size[-1] if config is not None else 224
    patch = re.search(r"patch(\d+)", name)
    side = int(patch.group(1)) * 4 if patch and int(patch.group(1)) >= 8 else 64
    sides = [min(side, size)] if size > 64 else []
    rows: list[tuple[dict[str, Any], int | None]] = []
    for arguments in ARGUMENTS:
        rows += [(arguments, s) for s in sides] + [(arguments, None)]
    return rows


def label(arguments: dict[str, Any], side: int | None) -> str:
    """A way of building in words."""
    return ", ".join([f"{k}={v}" for k, v in arguments.items()] + ([f"image {side}"] if side else [])) or "none"


def constructor(name: str, arguments: dict[str, Any], side: int | None) -> Callable[[], nn.Module]:
    """What builds a model in one of the ways of :func:`levels`."""

    def construct() -> nn.Module:
        import timm

        extra: dict[str, Any] = {}
        if side is not None:
            # Models of fixed size take img_size; the rest follow their input. The probes read input_size.
            extra = {"img_size": side, "pretrained_cfg_overlay": {"input_size": (3, side, side)}}
        model: nn.Module = timm.create_model(name, pretrained=False, num_classes=DEFAULT_CLASSES, **arguments, **extra)
        return model

    return construct


def timm_models() -> Iterator[Case]:
    """Every variant of the table that builds."""
    for name in timm_names():
        try:
            yield timm_case(name)[0]
        except Skipped:
            continue


def _family(name: str) -> str:
    match = re.match(r"(?:test_|tf_)?([a-z]+)", name)
    return match.group(1) if match else name


def choose_variants() -> dict[str, dict[str, list[str]]]:
    """Build every timm model on the meta device and choose; takes minutes. The tables are named as in the file."""
    import timm
    import torch

    from tools.census.zoo.case import is_batchnorm, is_layernorm

    chosen: dict[str, dict[str, list[str]]] = {table: {} for table in VARIANTS.values()}
    for module in timm.list_modules():
        sizes: list[tuple[int, str, bool, bool]] = []
        for name in timm.list_models(module=module):
            with torch.device("meta"):
                model = timm.create_model(name, pretrained=False)
            modules = list(model.modules())
            layernorms, batchnorms = any(map(is_layernorm, modules)), any(map(is_batchnorm, modules))
            sizes.append((sum(p.numel() for p in model.parameters()), name, layernorms, batchnorms))
        sizes.sort()
        smallest = [name for _, name, _, _ in sizes[:1]]
        chosen["variants"][module] = list(dict.fromkeys(smallest + _by_family([n for _, n, ln, _ in sizes if ln])))
        if found := _by_family([n for _, n, _, bn in sizes if bn]):
            chosen["batchnorm_variants"][module] = found
    return chosen


def _by_family(names: list[str]) -> list[str]:
    """The first of each family."""
    return sorted({_family(name): name for name in reversed(names)}.values())


if __name__ == "__main__":
    import timm

    TABLE.write_text(json.dumps({"timm": timm.__version__, **choose_variants()}, indent=1) + "\n")
