"""Models of a source's own library that have RMSNorm where it has LayerNorm: a table of what to try.

A row is a proposal and claims nothing: whether that model computes the same is for `normconvert.rewrites.native` to
prove, graph against graph.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from normconvert.plan.conversion_plan import edited_config
from normconvert.sources.source import Source
from normconvert.sources.transformers_models import config_of, default_config

EPS = object()
"""In a row's changes: the ε that all the source's norms have."""


@dataclass(frozen=True)
class Native:
    """A model that may be the converted one.

    Attributes:
        words: how a user would ask the library for it.
        architecture: class name (transformers) or model name (timm).
        config: what config.json says otherwise, dotted key -> value.
    """

    words: str
    architecture: str
    config: Mapping[str, Any]


Said = Callable[[Any], Any]
"""A value of a row that follows from the source's configuration, as the library has read it."""


@dataclass(frozen=True)
class _Row:
    """A family of transformers.

    Attributes:
        model_type: of the family that has RMSNorm.
        source, target: how the names of the classes of both begin.
        config: what its configuration says otherwise.
    """

    model_type: str
    source: str
    target: str
    config: Mapping[str, Any]


def _all(kind: str) -> Said:
    """A list of the same word for each layer."""
    return lambda config: [kind] * config.num_hidden_layers


_DENSE: Mapping[str, Any] = {
    "rms_norm_eps": EPS, "num_experts": 1, "num_experts_per_tok": 1, "mlp_layer_types": _all("dense"),
    "prefix_dense_intermediate_size": lambda config: config.intermediate_size,
    "head_dim": lambda config: config.hidden_size // config.num_attention_heads,
}  # fmt: skip
"""A model with experts in no layer."""
_TRANSFORMERS: Mapping[str, tuple[_Row, ...]] = {
    "olmo": (_Row("llama", "Olmo", "Llama", {"rms_norm_eps": EPS, "mlp_bias": False}),),
    # Positions are rotated in every layer if the pattern of the dense ones is 1, else where a window slides.
    "cohere": (
        _Row("cohere2_moe", "Cohere", "Cohere2Moe", {**_DENSE, "layer_types": _all("full_attention")}),
    ),
    "cohere2": (
        _Row("cohere2_moe", "Cohere2", "Cohere2Moe", {**_DENSE, "prefix_dense_sliding_window_pattern": 4}),
    ),
}  # fmt: skip
"""Model type -> families that have RMSNorm and may be the same otherwise."""


def natives(source: Source, eps: float) -> list[Native]:
    """The models to try, the likeliest first.

    Args:
        source: with LayerNorm.
        eps: of all its norms.
    """
    if source.library == "timm":
        # Most constructors take the name of a norm; what one makes of it shows in the graph.
        config = {**_split(source.config), "model_args.norm_layer": "rmsnorm"}
        return [Native('norm_layer="rmsnorm"', source.architecture, config)]
    rows = _TRANSFORMERS.get(str(source.config.get("model_type")), ()) if source.library == "transformers" else ()
    found = []
    for row in rows:
        name = row.target + source.architecture.removeprefix(row.source)
        if source.architecture.startswith(row.source) and (defaults := default_config(row.model_type)) is not None:
            own = config_of(source)
            # What both know the source says, whether its config.json does or leaves it to the default of its class.
            shared = {key: value for key, value in own.to_dict().items() if key in defaults}
            said = {key: value(own) if callable(value) else value for key, value in row.config.items()}
            said = {**shared, **said, "model_type": row.model_type, "architectures": [name]}
            config = {key: eps if value is EPS else value for key, value in said.items()}
            found.append(Native(name, name, {k: v for k, v in config.items() if source.config.get(k, EPS) != v}))
    return found


def _split(config: Mapping[str, Any]) -> dict[str, Any]:
    """What has timm read arguments beside the description of the weights, which once was the whole file."""
    if "pretrained_cfg" in config:
        return {}
    names = {"labels": "label_names"}
    described = {names.get(k, k): v for k, v in config.items() if k not in ("architecture", "num_features")}
    return {"pretrained_cfg": described}


@contextmanager
def as_native(source: Source, native: Native, changes: Mapping[str, Any]) -> Iterator[Source]:
    """The source as that model, while the context is open: what its library makes of the new config.json alone.

    Args:
        source: its weights are those of the original, and not to be loaded.
        native: the model.
        changes: further changes of config.json.
    """
    config = edited_config(source.config, {**changes, **native.config})
    with tempfile.TemporaryDirectory(prefix="normconvert-native-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        yield replace(source, folder=Path(folder), config=config, architecture=native.architecture, described=False)
