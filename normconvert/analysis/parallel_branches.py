"""Finding parallel branches that are one convolution: sum_i a_i * (W_i x + c_i) + e * x + b.

Re-parameterisable blocks (RepVGG, MobileOne, RepViT, FastViT) train several convolutions and a skip side by side, each
with a norm, and add them up. All are linear in the block's input, with taps at fixed places, so their sum is one
convolution (arXiv 2101.03697, section 3.3). No block is known by name: a module is such a block if what it returns is a
form of its input with such taps, followed by nothing but children (its activation, its attention).
"""

from __future__ import annotations

from dataclasses import dataclass

from normconvert.analysis.affine_forms import Tap
from normconvert.analysis.affine_norms import Call, calls_with_forms, uses_outside
from normconvert.analysis.channel_axes import shape_of
from normconvert.plan.vectors import Expression
from normconvert.tracing.graph import Graph


@dataclass(frozen=True)
class Block:
    """A module whose branches are one convolution.

    Attributes:
        path: its path.
        calls: in execution order.
        inputs: channels in; ``outputs`` channels out.
        kernel: of the one convolution, which is not dilated, as ``stride``, ``padding`` and ``groups``.
    """

    path: str
    calls: tuple[Call, ...]
    inputs: int
    outputs: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    groups: int

    @property
    def taps(self) -> tuple[Tap, ...]:
        """What is added up."""
        return self.calls[0].form.taps

    @property
    def shift(self) -> Expression:
        """What is added to the sum, one number a channel."""
        return self.calls[0].form.shift

    @property
    def keep(self) -> tuple[str, ...]:
        """The children that run afterwards."""
        return self.calls[0].keep

    def offset(self, tap: Tap) -> list[int]:
        """Where a tap's kernel begins in the one kernel, in each dimension."""
        return [p - q for p, q in zip(self.padding, tap.padding or (0,) * len(self.padding), strict=True)]


def find_blocks(graph: Graph) -> list[Block]:
    """All outermost modules whose branches can be merged, in execution order."""
    calls = calls_with_forms(graph, lambda nodes: True)
    found = {path: block for path, group in calls.items() if (block := _block(graph, path, group)) is not None}
    return [b for path, b in found.items() if not any(path.startswith(f"{other}.") for other in found)]


def _block(graph: Graph, path: str, calls: list[Call]) -> Block | None:
    """One convolution for all calls, if the taps fit each other."""
    taps = calls[0].form.taps
    convolutions = [t for t in taps if t.weight is not None]
    if len(taps) < 2 or not convolutions or any(call.effect != calls[0].effect for call in calls):
        return None
    first = convolutions[0]
    inputs, rank = int(shape_of(calls[0].source)[1]), len(first.kernel)
    skips = len(convolutions) < len(taps)
    if any((t.stride, t.groups, t.outputs) != (first.stride, first.groups, first.outputs) for t in convolutions):
        return None
    # The input itself is a tap only if each of its places has a result, and each channel one of its own.
    if skips and (set(first.stride) != {1} or first.outputs != inputs):
        return None
    # A kernel of one has nothing to spread. Taps of another dilated kernel may lie between each other's.
    if any(set(t.dilation) != {1} and set(t.kernel) != {1} for t in convolutions):
        return None
    # All results have one size only if 2 * padding - kernel is the same for all, and then the kernels are concentric.
    borders = {tuple(2 * p - k for p, k in zip(t.padding, t.kernel, strict=True)) for t in convolutions}
    # A skip is a kernel of one without padding.
    borders |= {(-1,) * rank} if skips else set()
    if len(borders) != 1:
        return None
    # Borders agree, so the most padded kernel is the largest and holds all the others.
    padding = tuple(max(t.padding[d] for t in convolutions) for d in range(rank))
    kernel = tuple(2 * p - b for p, b in zip(padding, next(iter(borders)), strict=True))
    # A branch that somebody reads by itself is still needed.
    if uses_outside(graph, path) or any(call.seen_halfway(graph) for call in calls):
        return None
    return Block(path, tuple(calls), inputs, first.outputs, kernel, first.stride, padding, first.groups)
