"""What is lost where numbers that become small leave the dtype's range downwards.

A stored number is the exact one, rounded once: off by half a unit at most. Among the smallest numbers of a dtype there
are fewer digits, so a tensor that is scaled down may lose more. It is refused if what is lost of all its numbers is
more than rounding alone can take.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from normconvert.errors import InputError
from normconvert.plan.edits import Edit


class Underflow:
    """Adds up what one tensor loses, piece by piece; one that only rounding changes is not looked at."""

    def __init__(self, name: str, edits: Sequence[Edit]) -> None:
        self.name = name
        self._rows = [edit for edit in edits if edit["op"] in ("times", "normed")]
        self._lost = self._size = 0.0

    def see(self, exact: Tensor, stored: Tensor) -> None:
        """A piece of the tensor, in float64 and as it is stored."""
        if self._rows:
            self._lost += float((stored.double() - exact).square().sum())
            # Where the model adds one to it, the sum is what takes the power.
            self._size += float((exact + float(self._rows[-1].get("offset", 0.0))).square().sum())

    def check(self, dtype: torch.dtype) -> None:
        """Refuse a tensor that has lost too much.

        Raises:
            InputError: names the tensor and the power.
        """
        if self._lost > (torch.finfo(dtype).eps / 2) ** 2 * self._size:
            share = (self._lost / self._size) ** 0.5 if self._size else 1.0
            name = str(dtype).removeprefix("torch.")
            if self._rows[0]["op"] == "normed":
                raise InputError(
                    f"tensor {self.name}: rows for which the norm behind it gives the same as before are so small that "
                    f"they lose {share:.2g} of their size in {name}: choose a wider --dtype"
                )
            power = sum(int(row["exponent"]) for row in self._rows)
            wider = ", or a wider --dtype" if dtype in (torch.float16, torch.bfloat16) else ""
            raise InputError(
                f"tensor {self.name} times 2^{power} loses {share:.2g} of its size in {name}: choose a --power nearer "
                f"to zero{wider}"
            )
