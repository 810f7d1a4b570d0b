"""A name of timm that is told nowhere: what it leaves out of a model's configuration when it writes one."""

from __future__ import annotations

from typing import Any

from normconvert.compat.private_names import PrivateName, needed

NAMES = (
    PrivateName(
        "timm.models.filter_pretrained_cfg", "the config.json that timm would write for bare weights", "1.0.26, 1.0.31"
    ),
)


def written_config(pretrained_cfg: dict[str, Any]) -> dict[str, Any]:
    """The part of a model's ``pretrained_cfg`` that timm writes into config.json.

    Raises:
        UnsupportedVersion: timm does not tell.
    """
    with needed(NAMES):
        from timm.models import filter_pretrained_cfg
    kept: dict[str, Any] = filter_pretrained_cfg(pretrained_cfg, remove_source=True, remove_null=True)
    return kept
