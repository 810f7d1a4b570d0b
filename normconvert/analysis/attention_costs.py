"""What softmax attention and linear attention cost, as a function of tokens and head size.

Softmax attention has 4 size operations for each pair of tokens, and an exponential; torch computes it in one kernel
that keeps the pairs to itself. Linear attention has 4 size operations for each number of the values (2 tokens, if that
is less), the convolution's 2 kernel^2 and many passes through memory, in a number of kernels that each take a while to
start. The weights of these parts are measured on a CPU (one thread, float32, tools/benchmarks/attention.py); on other
devices the crossing is elsewhere, and a measurement decides.
"""

from __future__ import annotations

from dataclasses import dataclass

EXPONENTIAL = 64
"""Operations that a pair's exponential, maximum, sum and quotient take."""
PASSES = 20
"""Times that linear attention reads or writes each number of the values."""
PER_BYTE = 7
"""Operations in the time of one byte."""
KERNELS = 15
"""More kernels than softmax attention has."""
PER_KERNEL = 1_600_000
"""Operations in the time that one of them takes to start."""


@dataclass(frozen=True)
class Cost:
    """What a call takes.

    Attributes:
        operations: multiplications, additions and their like.
        bytes: read and written.
        kernels: started, beside the first.
    """

    operations: int
    bytes: int
    kernels: int = 0

    @property
    def total(self) -> int:
        """All of it in the time of one operation."""
        return self.operations + PER_BYTE * self.bytes + PER_KERNEL * self.kernels


def softmax_cost(heads: int, tokens: int, size: int, *, batch: int = 1, width: int = 4) -> Cost:
    """Of scaled_dot_product_attention.

    Args:
        heads: of each example.
        tokens: that attend to each other.
        size: channels a head.
        batch: examples, or windows.
        width: bytes a number.
    """
    rows = batch * heads * tokens
    return Cost(rows * tokens * (4 * size + EXPONENTIAL), 4 * rows * size * width)


def linear_cost(heads: int, tokens: int, size: int, *, batch: int = 1, width: int = 4, kernel: int = 5) -> Cost:
    """Of linear attention with its convolution; arguments as for :func:`softmax_cost`, and the convolution's edge."""
    rows = batch * heads * tokens
    return Cost(rows * size * (4 * min(size, tokens) + 2 * kernel**2), PASSES * rows * size * width, KERNELS)


def gain(heads: int, tokens: int, size: int, *, batch: int = 1) -> float:
    """How many times as fast linear attention is, by the model; less than 1: slower."""
    costs = (cost(heads, tokens, size, batch=batch) for cost in (softmax_cost, linear_cost))
    softmax, linear = (cost.total for cost in costs)
    return softmax / linear


def crossing(heads: int, size: int, *, batch: int = 1) -> int:
    """From how many tokens on linear attention is faster, by the model."""
    few, many = 1, 2
    while gain(heads, many, size, batch=batch) < 1:
        few, many = many, 2 * many
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if gain(heads, middle, size, batch=batch) >= 1 else (middle, many)
    return many
