"""The picture of the README: one token of the residual stream before and after ``normconvert rmsnorm``.

    python tools/docs/stream_picture.py            # write docs/stream.svg

A token of sixteen channels, made up; what is done with it is computed: LayerNorm of it, and RMSNorm of it without its
mean, which are the same numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PICTURE = ROOT / "docs" / "stream.svg"
TOKEN = [1.9, 0.3, 1.4, -0.5, 2.3, 0.9, -0.2, 1.6, 0.5, 2.0, -0.9, 1.2, 0.1, 1.7, 0.8, -0.3]
WIDTH, PANEL, GAP = 760, 220, 50
TOP, HALF = 62, 46
"""Of the panels: the upper edge, and half of their height."""


@dataclass(frozen=True)
class Panel:
    """One row of bars: heading, values, what stands below, and a class of the style."""

    heading: str
    values: list[float]
    below: str
    kind: str


def panels() -> tuple[Panel, Panel, Panel]:
    """The token, the token without its mean, and what the two norms give."""
    mean = sum(TOKEN) / len(TOKEN)
    centred = [value - mean for value in TOKEN]
    layer_norm = [(value - mean) / math.sqrt(sum((v - mean) ** 2 for v in TOKEN) / len(TOKEN)) for value in TOKEN]
    rms_norm = [value / math.sqrt(sum(v * v for v in centred) / len(TOKEN)) for value in centred]
    assert all(math.isclose(a, b, abs_tol=1e-12) for a, b in zip(layer_norm, rms_norm, strict=True))
    return (
        Panel("before: the stream has a mean", TOKEN, "LayerNorm subtracts it", "before"),
        Panel("after: its writers are centred", centred, "RMSNorm suffices", "after"),
        Panel("what either norm gives", rms_norm, "the same function", "same"),
    )


def picture() -> str:
    """The SVG, in colours that are read on white and on black."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-12 0 {WIDTH + 24} 190" role="img" font-family="sans-serif" '
        f'font-size="13">',
        "<title>A token before the conversion, with a mean, and after it, without one; its norm gives the same</title>",
        "<style>text{fill:#57606a}.before{fill:#d1712b}.after{fill:#2b7fd1}.same{fill:#3f9c5a}"
        ".zero{stroke:#8b949e}.mean{stroke:#d1712b;stroke-dasharray:4 3}</style>",
    ]
    shown = panels()
    stream = max(abs(value) for panel in shown[:2] for value in panel.values)
    for number, panel in enumerate(shown):
        scale = HALF / (stream if number < 2 else max(map(abs, panel.values)))
        parts += _panel(panel, number * (PANEL + GAP), scale)
    arrows = [(PANEL + GAP // 2, "→"), (2 * PANEL + GAP + GAP // 2, "→")]
    parts += [
        f'<text x="{x}" y="{TOP + HALF + 6}" text-anchor="middle" font-size="22">{sign}</text>' for x, sign in arrows
    ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(panel: Panel, left: int, scale: float) -> list[str]:
    zero, step = TOP + HALF, PANEL / len(panel.values)
    mean = sum(panel.values) / len(panel.values)
    middle = left + PANEL / 2
    parts = [f'<text x="{middle:g}" y="24" text-anchor="middle" font-weight="bold">{panel.heading}</text>']
    parts.append(f'<g class="{panel.kind}">')
    for i, value in enumerate(panel.values):
        height = abs(value) * scale
        top = zero - height if value > 0 else zero
        parts.append(f'<rect x="{left + i * step:.1f}" y="{top:.1f}" width="{step - 1:.1f}" height="{height:.1f}"/>')
    parts.append("</g>")
    parts.append(f'<line class="zero" x1="{left}" x2="{left + PANEL}" y1="{zero}" y2="{zero}"/>')
    if panel.kind == "before":
        at = zero - mean * scale
        parts.append(f'<line class="mean" x1="{left}" x2="{left + PANEL}" y1="{at:.1f}" y2="{at:.1f}"/>')
    said = panel.below if panel.kind == "same" else f"mean {round(mean, 2) + 0.0:.2f}: {panel.below}"
    parts.append(f'<text x="{middle:g}" y="180" text-anchor="middle">{said}</text>')
    return parts


def main() -> int:
    """Write the picture."""
    PICTURE.write_text(picture(), encoding="utf-8")
    print(f"wrote {PICTURE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
