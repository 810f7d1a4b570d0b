"""Figures and files in words, for the console and the model card alike."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from normconvert.verification.fidelity import Fidelity


BECOMES = {
    "rmsnorm": "RMSNorm", "crmsnorm": "CRMSNorm", "fuse-bn": "fused", "fold": "folded", "rotate": "rotated",
    "scale": "scaled",
    **dict.fromkeys(["un", "repbn", "powernorm", "ln-free", "slab"], "swapped"),
}  # fmt: skip
"""Conversion -> what its norms become."""


EXACT = "forward() is exact; these return "
"""How the note begins that lists the ways out which return something else."""


def becomes(method: str) -> str:
    """What the norms become, for ``LayerNorm → …``."""
    return BECOMES.get(method, "converted")


def in_words(fidelity: Fidelity) -> dict[str, str]:
    """What was measured -> what was found, with its limit."""
    words = {"verified": fidelity.level}
    words["outputs in float64, relative error"] = f"{fidelity.algebra:.2g} (at most {fidelity.tolerance:.2g})"
    if fidelity.storage is not None:
        words["stored weights"] = f"{fidelity.storage:.2g} units off at most"
    if fidelity.rounding is not None:
        limit = f"{fidelity.rounding_tolerance:g}"
        words["rounding in the stored dtype"] = f"{fidelity.rounding:.3g} times the original's (at most {limit})"
    words["in use"] = task_metrics_in_words(fidelity)
    return words


def with_changes(note: str, fidelity: Fidelity) -> str:
    """A note that lists ways out with what was measured of each, in float64: ``hidden_states (changed by 0.071)``."""
    if not note.startswith(EXACT):
        return note
    head, _, ways = note.rpartition(": ")
    sizes = fidelity.moved
    return f"{head}: " + ", ".join(
        f"{way} (changed by {sizes[way]:.2g})" if sizes.get(way, inf) < inf else way for way in ways.split(", ")
    )


def task_metrics_in_words(fidelity: Fidelity) -> str:
    """The third figure: ``top-1 100 % the same, KL 1e-12, loss +2e-09``."""
    words = f"top-1 {percent(fidelity.top1)} the same, KL {fidelity.kl:.1g}"
    return words if fidelity.loss_difference is None else f"{words}, loss {fidelity.loss_difference:+.1g}"


def percent(share: float) -> str:
    """``99.99 %``; rounded down, so that 100 % means all."""
    return "100 %" if share >= 1.0 else f"{int(share * 10000) / 100:.2f} %"


def human_number(value: float | None) -> str:
    """Three significant digits; a dash for what was not measured."""
    return "–" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def human_bytes(size: float) -> str:
    """``2.7 MB``; decimal units, as huggingface counts."""
    units = ["bytes", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size /= 1000
        del units[0]
    return f"{size:.0f} {units[0]}" if units[0] == "bytes" or size >= 100 else f"{size:.1f} {units[0]}"
