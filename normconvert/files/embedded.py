"""The models embedded in the package: ``demo:gpt2``, ``demo:vit``, ``demo:convnet``.

They are trained for real, by ``tools/demos/train_demos.py``. Each is an ordinary checkpoint folder, with a model card
that states its data, licence and what it learnt.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from normconvert.errors import InputError

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
    return Path(__file__).parents[1] / "demos" / name


def held_out_text() -> str:
    """Text that ``demo:gpt2`` has not seen: whole books of the King James Bible, in the public domain."""
    return (demo_folder("gpt2") / "heldout.txt").read_text(encoding="utf-8")
