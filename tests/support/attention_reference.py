"""Simplified linear attention in plain numpy, float64, one image at a time: forward, and gradients derived by hand.

Written from the paper's equations (arXiv 2405.11582), with a matrix of all pairs and loops over the convolution's
places, so that it shares no code with the module.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class LinearAttentionReference:
    """For (heads, tokens, size); parameters as the module's, without the convolution's empty dimension."""

    def __init__(self, positions: Array, weight: Array, bias: Array, grid: tuple[int, int], prefix: int) -> None:
        self.positions, self.weight, self.bias, self.grid, self.prefix = positions, weight, bias, grid, prefix

    def forward(self, q: Array, k: Array, v: Array) -> Array:
        self.q, self.shifted, self.v = q, k + self.positions, v
        self.pairs = np.maximum(q, 0) @ np.maximum(self.shifted, 0).transpose(0, 2, 1)
        self.divisor = self.pairs.sum(2, keepdims=True) + 1e-6
        self.attended = self.pairs @ v / self.divisor
        return self.attended + self._convolved()

    def _places(self, t: int) -> list[tuple[int, int, int]]:
        """(token, row and column of the kernel) that a token of the grid sees."""
        height, width = self.grid
        half = self.weight.shape[1] // 2
        y, x = divmod(t, width)
        return [
            ((y + i) * width + x + j, i + half, j + half)
            for i in range(-half, half + 1)
            for j in range(-half, half + 1)
            if 0 <= y + i < height and 0 <= x + j < width
        ]

    def _convolved(self) -> Array:
        out = np.zeros_like(self.v)
        for h in range(self.v.shape[0]):
            for t in range(self.grid[0] * self.grid[1]):
                out[h, self.prefix + t] = self.bias
                for other, i, j in self._places(t):
                    out[h, self.prefix + t] += self.weight[:, i, j] * self.v[h, self.prefix + other]
        return out

    def backward(self, g: Array) -> dict[str, Array]:
        da = g / self.divisor
        dpairs = da @ self.v.transpose(0, 2, 1) - (g * self.attended).sum(2, keepdims=True) / self.divisor
        dv = self.pairs.transpose(0, 2, 1) @ da
        dq = dpairs @ np.maximum(self.shifted, 0) * (self.q > 0)
        dk = dpairs.transpose(0, 2, 1) @ np.maximum(self.q, 0) * (self.shifted > 0)
        dweight, dbias = np.zeros_like(self.weight), np.zeros_like(self.bias)
        for h in range(self.v.shape[0]):
            for t in range(self.grid[0] * self.grid[1]):
                gradient = g[h, self.prefix + t]
                dbias += gradient
                for other, i, j in self._places(t):
                    dweight[:, i, j] += gradient * self.v[h, self.prefix + other]
                    dv[h, self.prefix + other] += gradient * self.weight[:, i, j]
        return {"q": dq, "k": dk, "v": dv, "positions": dk, "weight": dweight, "bias": dbias}
