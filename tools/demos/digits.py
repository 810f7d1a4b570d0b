"""scikit-learn's handwritten digits as tensors: what the demo models learnt from.

``python -m tools.demos.digits`` writes the held-out ones into the package, which has them without scikit-learn.
"""

from __future__ import annotations

from pathlib import Path

from normconvert.tuning.data.digits import MEAN, STD, digits

__all__ = ["MEAN", "STD", "digits", "held_out_lines"]

HELD_OUT = Path(__file__).resolve().parents[2] / "normconvert" / "demos" / "heldout_digits.csv"


def held_out_lines() -> list[str]:
    """The 360 digits of the test set as the UCI repository writes them: 64 pixels from 0 to 16, then the digit."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    _, rows = train_test_split(range(len(data.target)), test_size=360, random_state=0, stratify=data.target)
    return [",".join(str(int(value)) for value in [*data.data[row], data.target[row]]) for row in rows]


if __name__ == "__main__":
    HELD_OUT.write_text("".join(f"{line}\n" for line in held_out_lines()), encoding="ascii")
