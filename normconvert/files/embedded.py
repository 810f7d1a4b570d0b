"""The models embedded in the package: ``demo:gpt2``, ``demo:vit``, ``demo:convnet``.

They are trained for real, by ``tools/demos/train_demos.py``. Each is an ordinary checkpoint folder, with a model card
that states its data, licence and what it learnt.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING

from normconvert.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

DEMO_FOLDERS = Path(__file__).parents[1] / "demos"
DEMOS: dict[str, str] = {
    "gpt2": "transformers",
    "vit": "timm",
    "convnet": "timm",
}
"""Name -> the library that loads it."""


def demo_folder(name: str) -> Path:
    """The checkpoint folder of the demo model ``name``, as in ``demo:name``.

    Raises:
        InputError: there is no such demo model.
    """
    if name not in DEMOS:
        close = difflib.get_close_matches(name, DEMOS, n=1)
        hint = f"; did you mean demo:{close[0]}?" if close else ""
        raise InputError(f"demo:{name}: no such demo: expected one of {', '.join(sorted(DEMOS))}{hint}")
    return DEMO_FOLDERS / name


def held_out_text() -> str:
    """Text that ``demo:gpt2`` has not seen: whole books of the King James Bible, in the public domain."""
    return (demo_folder("gpt2") / "heldout.txt").read_text(encoding="utf-8")


def held_out_digits() -> tuple[Tensor, Tensor]:
    """Handwritten digits that ``demo:vit`` and ``demo:convnet`` have not seen, one line of the file each.

    360 of the 1,797 images that scikit-learn ships, in its layout: Alpaydin and Kaynak, "Optical Recognition of
    Handwritten Digits", UCI Machine Learning Repository, CC BY 4.0.

    Returns:
        Images, uint8 ``[360, 8, 8]`` from 0 (paper) to 16 (ink); labels, int64 ``[360]``.
    """
    import torch

    lines = (DEMO_FOLDERS / "heldout_digits.csv").read_text(encoding="ascii").splitlines()
    table = torch.tensor([[int(value) for value in line.split(",")] for line in lines])
    return table[:, :-1].reshape(-1, 8, 8).to(torch.uint8), table[:, -1]
