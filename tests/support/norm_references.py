"""The training norms' papers in plain numpy, float64, one batch at a time, for inputs (tokens, channels).

Written from the equations, with loops and branches where the modules have masks, so that the two share no code.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class UnifiedReference:
    """Unified Normalization, arXiv 2208.01313: sections 3.2 and 3.3, and the published code's gradient ratio.

    An outlier enters the running variance, as any other batch does, as the geometric mean of its window.
    """

    def __init__(self, gamma: Array, beta: Array, *, eps: float, window: int, alpha: float, warmup: int,
                 filtration: bool, ratio_after: int) -> None:  # fmt: skip
        self.gamma, self.beta, self.eps, self.m, self.alpha = gamma, beta, eps, window, alpha
        self.warmup, self.filtration, self.ratio_after = warmup, filtration, ratio_after
        c = len(gamma)
        self.running, self.psi = np.ones(c), np.zeros(c)
        self.squares: list[Array] = [np.zeros(c) for _ in range(window)]
        self.products: list[Array] = [np.zeros(c) for _ in range(window)]
        self.t = self.skipped = 0

    def forward(self, x: Array, valid: NDArray[np.bool_] | None = None) -> Array:
        self.valid = np.ones(len(x), bool) if valid is None else valid
        self.t += 1
        x2 = (x[self.valid] ** 2).mean(0)
        recorded = np.sqrt(np.stack(self.squares)).var(ddof=1)
        self.squares[self.t % self.m] = x2
        self.skip, outlier = self.m == 1, None
        if self.filtration and self.t >= self.warmup:
            arithmetic = np.mean(self.squares, 0)
            geometric = np.prod(self.squares, 0) ** (1 / self.m)
            if np.any(arithmetic - geometric > self.m * recorded):
                self.squares[self.t % self.m] = self.running.copy()
                self.skip, outlier = True, geometric
                self.skipped += 1
        smoothing = self.t > self.m and self.t >= self.warmup and not self.skip
        self.var = np.prod(self.squares, 0) ** (1 / self.m) if smoothing else x2
        self.r = np.ones_like(x2)
        if self.t > max(self.ratio_after, self.warmup) and not self.skip:
            self.r = np.clip(np.sqrt(self.var + self.eps) / np.sqrt(self.running + self.eps), 1 / 5, 5)
        lasting = self.var if outlier is None or self.t <= self.m else outlier
        self.running = self.alpha * self.running + (1 - self.alpha) * lasting
        self.z = x / np.sqrt(self.var + self.eps)
        return self.gamma * self.z + self.beta

    def backward(self, dy: Array) -> tuple[Array, Array, Array]:
        g = dy * self.gamma * self.r
        gz = (g * self.z).sum(0) / self.valid.sum()
        self.products[self.t % self.m] = self.psi.copy() if self.skip else gz
        smoothing = self.t > self.m and self.t >= self.warmup and not self.skip
        smoothed = np.mean(self.products, 0) if smoothing else gz
        self.psi = self.alpha * self.psi + (1 - self.alpha) * smoothed
        pull = smoothed if self.skip else self.psi
        dx = g - pull * self.z * self.valid[:, None]
        return dx / np.sqrt(self.var + self.eps), (dy * self.r * self.z).sum(0), dy.sum(0)

    def state(self) -> dict[str, Any]:
        return {"running_var": self.running, "smooth_gz": self.psi, "window_x2": np.stack(self.squares),
                "window_gz": np.stack(self.products), "skipped": self.skipped}  # fmt: skip


class PowerReference:
    """PowerNorm, arXiv 2003.07845, algorithm 2, with the published code's warm-up."""

    def __init__(self, gamma: Array, beta: Array, *, eps: float, alpha: float, warmup: int) -> None:
        self.gamma, self.beta, self.eps, self.alpha, self.warmup = gamma, beta, eps, alpha, warmup
        self.phi, self.nu, self.t = np.ones(len(gamma)), np.zeros(len(gamma)), 0

    def forward(self, x: Array, valid: NDArray[np.bool_] | None = None) -> Array:
        self.valid = np.ones(len(x), bool) if valid is None else valid
        self.t += 1
        x2 = (x[self.valid] ** 2).mean(0)
        self.root = np.sqrt((x2 if self.t <= self.warmup else self.phi) + self.eps)
        self.x_hat = x / self.root
        if self.t < self.warmup:
            self.phi = self.phi * (self.t - 1) / self.t + x2 / self.t
        self.phi = self.alpha * self.phi + (1 - self.alpha) * x2
        return self.gamma * self.x_hat + self.beta

    def backward(self, dy: Array) -> tuple[Array, Array, Array]:
        g, inside, n = dy * self.gamma, self.x_hat * self.valid[:, None], self.valid.sum()
        dx = (g - self.nu * inside) / self.root
        big_gamma, big_lambda = (inside**2).sum(0) / n, (g * self.x_hat).sum(0) / n
        self.nu = self.nu * (1 - (1 - self.alpha) * big_gamma) + (1 - self.alpha) * big_lambda
        return dx, (dy * self.x_hat).sum(0), dy.sum(0)

    def state(self) -> dict[str, Any]:
        return {"running_phi": self.phi, "nu": self.nu}


class RepReference:
    """PRepBN, arXiv 2405.11582: λ LN(x) + (1-λ)(BN(x) + ηx), its gradients written out."""

    def __init__(self, gamma: Array, beta: Array, old_gamma: Array, old_beta: Array, eta: float, *, eps: float) -> None:
        self.gamma, self.beta, self.old_gamma, self.old_beta, self.eta = gamma, beta, old_gamma, old_beta, eta
        self.eps, self.mean, self.var, self.mix = eps, np.zeros(len(gamma)), np.ones(len(gamma)), 1.0

    def forward(self, x: Array, valid: NDArray[np.bool_] | None = None) -> Array:
        self.x, self.valid = x, np.ones(len(x), bool) if valid is None else valid
        inside = x[self.valid]
        mean, var, n = inside.mean(0), inside.var(0), len(inside)
        self.mean = 0.9 * self.mean + 0.1 * mean
        self.var = 0.9 * self.var + 0.1 * var * n / (n - 1)
        self.root = np.sqrt(var + self.eps)
        self.z = (x - mean) / self.root
        rep = self.gamma * self.z + self.beta + self.eta * x
        self.deviation = np.sqrt(x.var(1, keepdims=True) + self.eps)
        self.normal = (x - x.mean(1, keepdims=True)) / self.deviation
        return self.mix * (self.normal * self.old_gamma + self.old_beta) + (1 - self.mix) * rep

    def backward(self, dy: Array) -> tuple[Array, Array, Array]:
        g = (1 - self.mix) * dy * self.gamma
        v, n = self.valid[:, None], self.valid.sum()
        through_bn = (g - v * (g.sum(0) + self.z * (g * self.z).sum(0)) / n) / self.root
        h = self.mix * dy * self.old_gamma
        through_ln = h - h.mean(1, keepdims=True) - self.normal * (h * self.normal).mean(1, keepdims=True)
        dx = through_bn + (1 - self.mix) * self.eta * dy + through_ln / self.deviation
        self.d_eta = ((1 - self.mix) * dy * self.x).sum()
        return dx, ((1 - self.mix) * dy * self.z).sum(0), (1 - self.mix) * dy.sum(0)

    def state(self) -> dict[str, Any]:
        return {"running_mean": self.mean, "running_var": self.var}


class FrozenReference:
    """LN with its divisor frozen, arXiv 2507.02559; inputs are (sequences * positions, channels)."""

    def __init__(self, gamma: Array, beta: Array, *, eps: float, momentum: float, positions: int) -> None:
        self.gamma, self.beta, self.eps, self.momentum, self.positions = gamma, beta, eps, momentum, positions
        self.average = self.first = 1.0
        self.frozen, self.apart = False, True

    def forward(self, x: Array, valid: NDArray[np.bool_] | None = None) -> Array:
        valid = np.ones(len(x), bool) if valid is None else valid
        first = np.zeros(len(x), bool)
        for start in range(0, len(x), self.positions):  # padding on the left is no part of a sequence
            first[start + int(np.argmax(valid[start : start + self.positions]))] = True
        self.centred = x - x.mean(1, keepdims=True)
        sigma = np.sqrt((self.centred**2).mean(1) + self.eps)
        if not self.frozen:
            keep = self.momentum
            self.average = keep * self.average + (1 - keep) * sigma[valid & ~first].mean()
            if (valid & first).any():
                self.first = keep * self.first + (1 - keep) * sigma[valid & first].mean()
            self.sigma = sigma
        else:
            self.sigma = np.where(first & self.apart, self.first, self.average)
        self.z = (x if self.frozen else self.centred) / self.sigma[:, None]
        return self.gamma * self.z + self.beta

    def backward(self, dy: Array) -> tuple[Array, Array, Array]:
        g = dy * self.gamma
        dx = g
        if not self.frozen:
            dx = dx - g.mean(1, keepdims=True) - self.z * (g * self.z).mean(1, keepdims=True)
        return dx / self.sigma[:, None], (dy * self.z).sum(0), dy.sum(0)

    def state(self) -> dict[str, Any]:
        return {"average": self.average, "first": self.first}
