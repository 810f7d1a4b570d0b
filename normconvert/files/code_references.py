"""Where a configuration names code that comes with a checkpoint, which transformers runs for whoever trusts it."""

from __future__ import annotations

from typing import Any

OWN_MODULE = "modeling_normconvert."
"""The runtime file shipped with outputs: not foreign code."""


def without_code(data: Any) -> Any:
    """A copy of config data in which ``auto_map``, at any depth, names no code but the file that normconvert ships."""
    if isinstance(data, list):
        return [without_code(item) for item in data]
    if not isinstance(data, dict):
        return data
    kept = {key: without_code(value) for key, value in data.items() if key != "auto_map"}
    entries = data.get("auto_map")
    if isinstance(entries, dict):
        ours = {k: v for k, v in entries.items() if isinstance(v, str) and v.startswith(OWN_MODULE)}
        kept |= {"auto_map": ours} if ours else {}
    # In the order of the original, which decides the bytes.
    return {key: kept[key] for key in data if key in kept}
