"""Example calls of every operation in the op table, on small float64 tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers.integrations.moe  # noqa: F401  # registers transformers::grouped_mm_fallback
from torch import Tensor

import normconvert.tracing.graph  # noqa: F401  # registers normconvert::boundary

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Example:
    """A call: an operation, its arguments (tensors anywhere in them), and which part of a tuple is taken, if any."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    part: int | None = None


def r(*shape: int) -> Tensor:
    return torch.randn(shape, generator=_GENERATOR, dtype=torch.float64)


def mask(*shape: int) -> Tensor:
    return r(*shape) > 0


def index(high: int, *shape: int) -> Tensor:
    return torch.randint(0, high, shape, generator=_GENERATOR)


_GENERATOR = torch.Generator().manual_seed(0)


def call(target: Any, *args: Any, part: int | None = None, **kwargs: Any) -> Example:
    return Example(target, args, kwargs, part)


def same(target: Any, *args: Any, **kwargs: Any) -> list[Example]:
    """The operation on a tensor of three different and of three equal dimensions."""
    return [call(target, r(2, 3, 4), *args, **kwargs), call(target, r(4, 4, 4), *args, **kwargs)]


def moved(target: Any, *args: Any) -> list[Example]:
    return [*same(target, *args), call(target, r(2, 3, 4, 5), *args)]


def pool(target: Any, spatial: int, *args: Any) -> list[Example]:
    """On a batch of images and on one image, with as many channels as the images are wide."""
    return [call(target, r(*(2, 4, *[4] * spatial)), *args), call(target, r(*(4, *[4] * spatial)), *args)]


def resize(target: Any, spatial: int, *args: Any) -> list[Example]:
    return [call(target, r(*(4, 4, *[4] * spatial)), [3] * spatial, *args)]


def conv(target: Any, spatial: int) -> list[Example]:
    shape = [4] * spatial
    kernel = [2] * spatial
    return [
        call(target, r(2, 3, *shape), r(5, 3, *kernel), r(5)),
        call(target, r(4, 4, *shape), r(4, 4, *kernel), r(4)),
        call(target, r(4, 4, *shape), r(4, 4, *kernel), bias=r(4)),
        call(target, r(2, 4, *shape), r(4, 4, *kernel), None, [2] * spatial, [1] * spatial),
        call(target, r(4, *shape), r(4, 4, *kernel), r(4)),
    ]


def conv_transpose(target: Any, spatial: int) -> list[Example]:
    shape, kernel, one, none = [4] * spatial, [2] * spatial, [1] * spatial, [0] * spatial
    return [
        call(target, r(2, 3, *shape), r(3, 5, *kernel), r(5)),
        call(target, r(4, 4, *shape), r(4, 4, *kernel), r(4), one, none, none, 1),
        call(target, r(4, *shape), r(4, 4, *kernel), r(4)),
        call(target, r(2, 4, *shape), r(4, 2, *kernel), None, one, none, none, 2),
    ]


_X, _LAST = (2, 3, 4), (4, 4, 4)
_OFFSETS = torch.tensor([1, 1, 4], dtype=torch.int32)
EXAMPLES: dict[str, list[Example]] = {
    "normconvert.boundary": same(torch.ops.normconvert.boundary.default, "a", "input", "0"),
    "aten.clone": same(aten.clone.default),
    "aten.contiguous": same(aten.contiguous.default),
    "aten.alias": same(aten.alias.default),
    "aten.detach": same(aten.detach.default),
    "aten.detach_": same(aten.detach_.default),
    "aten.to": [*same(aten.to.dtype, torch.float32), call(aten.to.dtype, index(3, 2, 3), torch.float64)],
    "aten._to_copy": same(aten._to_copy.default, dtype=torch.float32),
    "aten.type_as": [call(aten.type_as.default, r(*_X), r(3))],
    "aten.lift_fresh_copy": same(aten.lift_fresh_copy.default),
    "aten.neg": same(aten.neg.default),
    "aten.dropout": [*same(aten.dropout.default, 0.5, False), call(aten.dropout.default, r(*_X), 0.5, True)],
    "aten.feature_dropout": same(aten.feature_dropout.default, 0.5, False),
    "aten.alpha_dropout": same(aten.alpha_dropout.default, 0.5, False),
    "aten.add": [
        call(aten.add.Tensor, r(*_X), r(*_X)),
        call(aten.add.Tensor, r(*_X), r(4), alpha=3),
        call(aten.add.Tensor, r(2, 3, 1), r(1, 4)),
        call(aten.add.Tensor, r(*_LAST), r(4, 1)),
        call(aten.add.Tensor, r(*_X), 1.5),
        call(aten.add.Scalar, r(*_X), 2),
        call(aten.add.Tensor, r(*_X), index(5, 3, 4)),
    ],
    "aten.sub": [call(aten.sub.Tensor, r(*_X), r(3, 1), alpha=2), call(aten.sub.Tensor, r(*_LAST), 1.0)],
    "aten.rsub": [call(aten.rsub.Scalar, r(*_X), 1.0), call(aten.rsub.Tensor, r(*_LAST), r(4))],
    "aten.mul": [
        call(aten.mul.Tensor, r(*_X), r(*_X)),
        call(aten.mul.Tensor, r(*_X), r(3, 1)),
        call(aten.mul.Tensor, r(4), r(*_LAST)),
        call(aten.mul.Tensor, r(*_X), -2.0),
        call(aten.mul.Tensor, r(*_X), mask(2, 3, 1)),
        call(aten.mul.Tensor, r(2, 1, 4), r(3, 1)),
    ],
    "aten.div": [
        call(aten.div.Tensor, r(*_X), r(*_X)),
        call(aten.div.Tensor, r(*_LAST), r(4, 1)),
        call(aten.div.Tensor, r(4), r(*_LAST)),
        call(aten.div.Tensor, r(*_X), 3.0),
    ],
    "aten.div.Tensor_mode": [
        call(aten.div.Tensor_mode, r(*_X), r(3, 1), rounding_mode=None),
        call(aten.div.Tensor_mode, r(*_X), r(3, 1), rounding_mode="floor"),
    ],
    "aten.div.Scalar_mode": [
        call(aten.div.Scalar_mode, r(*_X), 3.0, rounding_mode=None),
        call(aten.div.Scalar_mode, r(*_X), 3.0, rounding_mode="trunc"),
    ],
    "aten.where": [
        call(aten.where.self, mask(2, 3, 1), r(*_X), r(*_X)),
        call(aten.where.self, mask(*_LAST), r(*_LAST), r(4)),
        call(aten.where.ScalarOther, mask(3, 4), r(*_X), 2.0),
        call(aten.where.ScalarOther, mask(3, 1), r(*_X), 0.0),
        call(aten.where.ScalarSelf, mask(3, 1), 1.0, r(*_X)),
        call(aten.where.self, mask(*_X), r(1, 4), r(3, 1)),
    ],
    "aten.masked_fill": [
        call(aten.masked_fill.Scalar, r(*_X), mask(3, 1), 0.0),
        call(aten.masked_fill.Scalar, r(*_LAST), mask(4), 1.0),
        call(aten.masked_fill.Tensor, r(*_X), mask(2, 3, 1), torch.tensor(2.0, dtype=torch.float64)),
    ],
    "aten.masked_scatter": [
        call(aten.masked_scatter.default, r(*_X), mask(2, 3, 1), r(6, 4)),
        call(aten.masked_scatter.default, r(*_LAST), mask(4, 4, 1), r(16, 4)),
        call(aten.masked_scatter.default, r(*_X), mask(2, 3, 4), r(6, 4)),
        call(aten.masked_scatter.default, r(*_X), mask(2, 3, 1), r(3, 8)),
        call(aten.masked_scatter.default, r(*_X), mask(2, 3, 1), r(12, 2)),
    ],
    "aten.permute": [*same(aten.permute.default, [2, 0, 1]), *same(aten.permute.default, [0, -1, 1])],
    "aten.transpose": [*moved(aten.transpose.int, 1, 2), *moved(aten.transpose.int, 0, -1)],
    "aten.t": [call(aten.t.default, r(3, 4)), call(aten.t.default, r(4, 4)), call(aten.t.default, r(4))],
    "aten.mT": [call(aten.mT.default, r(*_X)), call(aten.mT.default, r(*_LAST))],
    "aten.swapaxes": moved(aten.swapaxes.default, 0, 1),
    "aten.swapdims": moved(aten.swapdims.default, -1, 1),
    "aten.numpy_T": [
        call(aten.numpy_T.default, r(4, 4)),
        call(aten.numpy_T.default, r(*_X)),
        call(aten.numpy_T.default, r(*_LAST)),
    ],
    "aten.movedim": [
        *moved(aten.movedim.int, 0, 2),
        *moved(aten.movedim.int, -1, 0),
        *moved(aten.movedim.intlist, [0, 2], [1, 0]),
    ],
    "aten.view": [
        call(aten.view.default, r(*_X), [6, 4]),
        call(aten.view.default, r(*_X), [2, 12]),
        call(aten.view.default, r(*_LAST), [2, 2, 4, 4]),
        call(aten.view.default, r(4, 6), [4, 3, 2]),
        call(aten.view.default, r(4, 3, 2), [2, 2, 6]),
        call(aten.view.default, r(4, 6), [24]),
        call(aten.view.default, r(4, 6), [6, 4]),
        call(aten.view.default, r(3, 1, 4), [3, 4, 1]),
    ],
    "aten.reshape": [
        call(aten.reshape.default, r(2, 3, 4), [-1, 2, 6]),
        call(aten.reshape.default, r(4, 4).t(), [2, 8]),
    ],
    "aten._unsafe_view": [call(aten._unsafe_view.default, r(*_X), [6, 4])],
    "aten.flatten": [
        *moved(aten.flatten.using_ints, 1, 2),
        *moved(aten.flatten.using_ints, 0, 1),
        *moved(aten.flatten.using_ints),
    ],
    "aten.unflatten": [call(aten.unflatten.int, r(2, 6, 4), 1, [2, 3]), call(aten.unflatten.int, r(2, 8), -1, [2, 4])],
    "aten.view.dtype": [call(aten.view.dtype, r(*_X), torch.int64)],
    "aten.squeeze": [
        call(aten.squeeze.default, r(2, 1, 4)),
        call(aten.squeeze.dim, r(2, 1, 4), 1),
        call(aten.squeeze.dim, r(*_X), 1),
        call(aten.squeeze.dims, r(1, 4, 1, 4), [0, 2]),
    ],
    "aten.unsqueeze": [*same(aten.unsqueeze.default, 1), *same(aten.unsqueeze.default, -1)],
    "aten.expand": [
        call(aten.expand.default, r(1, 3, 4), [2, -1, 4]),
        call(aten.expand.default, r(4), [4, 4]),
        call(aten.expand.default, r(4, 1), [4, 4]),
    ],
    "aten.expand_as": [call(aten.expand_as.default, r(1, 4), r(*_LAST))],
    "aten.broadcast_to": [call(aten.broadcast_to.default, r(3, 1), [2, 3, 3])],
    "aten.slice": [
        call(aten.slice.Tensor, r(*_X), 1, 1, 3),
        call(aten.slice.Tensor, r(*_X), 2, 0, 9223372036854775807),
        call(aten.slice.Tensor, r(2, 8), 1, 4, 8),
        call(aten.slice.Tensor, r(2, 8), 1, 2, 6),
        call(aten.slice.Tensor, r(2, 8), -1, -4, -2),
        call(aten.slice.Tensor, r(2, 8), 1, 0, 8, 2),
        call(aten.slice.Tensor, r(2, 9), 1, 3, 9),
        call(aten.slice.Tensor, r(2, 6), 1, -9, 3),
        call(aten.slice.Tensor, r(8, 2)),
        call(aten.slice.Tensor, r(8, 2), 0, None, 4),
    ],
    "aten.split": [
        call(aten.split.Tensor, r(2, 8), 4, 1),
        call(aten.split.Tensor, r(2, 7), 4, 1),
        call(aten.split.Tensor, r(4, 4), 2),
    ],
    "aten.split_with_sizes": [
        call(aten.split_with_sizes.default, r(2, 8), [4, 4], -1),
        call(aten.split_with_sizes.default, r(2, 8), [2, 6], 1),
        call(aten.split_with_sizes.default, r(8, 2), [2, 2, 4]),
    ],
    "aten.chunk": [call(aten.chunk.default, r(2, 8), 2, -1), call(aten.chunk.default, r(2, 7), 2, 1)],
    "aten.unsafe_split": [call(aten.unsafe_split.Tensor, r(2, 8), 4, 1)],
    "aten.unbind": [call(aten.unbind.int, r(*_X), 1), call(aten.unbind.int, r(*_LAST))],
    "aten.select": [*same(aten.select.int, 1, 0), *same(aten.select.int, -1, 1), *same(aten.select.int, 0, 0)],
    "<built-in function getitem>": [
        call(aten.split.Tensor, r(2, 8), 4, 1, part=1),
        call(aten.split.Tensor, r(2, 7), 4, 1, part=1),
        call(aten.split_with_sizes.default, r(7, 2), [4, 3], part=1),
        call(aten.unbind.int, r(*_LAST), 1, part=2),
    ],
    "aten.cat": [
        call(aten.cat.default, [r(2, 3), r(2, 3)], 1),
        call(aten.cat.default, [r(2, 3), r(2, 4)], -1),
        call(aten.cat.default, [r(4, 4), r(4, 4), r(4, 4)]),
        call(aten.cat.default, [r(2, 1, 4), r(2, 3, 4)], 1),
    ],
    "aten.concat": [call(aten.concat.default, [r(2, 3), r(2, 3)], 1)],
    "aten.concatenate": [call(aten.concatenate.default, [r(2, 3), r(2, 3)], 1)],
    "aten.stack": [
        *(call(aten.stack.default, [r(3, 4), r(3, 4)], d) for d in (0, 1, -1)),
        call(aten.stack.default, [r(4, 4)] * 1),
    ],
    "aten.pad": [
        call(aten.pad.default, r(*_X), [0, 0, 1, 1]),
        call(aten.pad.default, r(*_X), [1, 0], "constant", 2.0),
        call(aten.pad.default, r(*_LAST), [1, 1], "replicate"),
        call(aten.pad.default, r(*_X), [0, 0, 0, -1]),
        call(aten.pad.default, r(*_LAST), [1, -1]),
    ],
    "aten.constant_pad_nd": [
        call(aten.constant_pad_nd.default, r(*_X), [0, 0, 1, 0]),
        call(aten.constant_pad_nd.default, r(*_X), [0, 0, 1, 0], 1.5),
    ],
    "aten.repeat": [
        call(aten.repeat.default, r(*_X), [1, 2, 1]),
        call(aten.repeat.default, r(4), [4, 1]),
        call(aten.repeat.default, r(2, 4), [2, 1, 2]),
    ],
    "aten.tile": [call(aten.tile.default, r(*_X), [2, 1]), call(aten.tile.default, r(4, 4), [2])],
    "aten.repeat_interleave": [
        call(aten.repeat_interleave.self_int, r(*_X), 2, 1),
        call(aten.repeat_interleave.self_int, r(*_X), 2),
        call(aten.repeat_interleave.self_Tensor, r(*_X), torch.tensor([1, 2, 0]), 1),
        call(aten.repeat_interleave.self_int, r(*_LAST), 1, 2),
    ],
    "aten.roll": [
        *same(aten.roll.default, [1], [1]),
        *same(aten.roll.default, [1]),
        *same(aten.roll.default, [1, 2], [0, -1]),
    ],
    "aten.flip": [*same(aten.flip.default, [1]), *same(aten.flip.default, [-1, 0]), *same(aten.flip.default, [])],
    "aten.index_select": [
        call(aten.index_select.default, r(*_LAST), d, torch.tensor([1, 0, 2, 3])) for d in (0, 1, -1)
    ],
    "aten.index": [
        call(aten.index.Tensor, r(*_LAST), [index(4, 4)]),
        call(aten.index.Tensor, r(*_LAST), [None, index(4, 4)]),
        call(aten.index.Tensor, r(*_LAST), [index(4, 4), None, index(4, 4)]),
        call(aten.index.Tensor, r(4, 4, 4, 4), [None, index(4, 4, 4), index(4, 4, 4)]),
        call(aten.index.Tensor, r(4, 4, 4, 4), [None, index(4, 4), None, index(4, 4)]),
        call(aten.index.Tensor, r(*_LAST), [mask(4, 4)]),
        call(aten.index.Tensor, r(*_LAST), [None, mask(4)]),
        call(aten.index.Tensor, r(*_LAST), [index(4, 4, 1), index(4, 1, 4)]),
    ],
    "aten.index_put": [
        *[
            call(aten.index_put.default, r(*_LAST), at, values)
            for at, values in [([mask(4, 4)], r(1, 4)), ([mask(4)], r(4, 4)), ([index(4, 3)], r(4, 1))]
            + [([None, index(4, 2)], r(4, 2, 4)), ([index(4, 3), None, index(4, 3)], r(3, 4))]
        ],
        *[call(aten.index_put.default, r(*_X), [mask(2, 3)], values) for values in (r(4), r(1, 1))],
        call(aten.index_put.default, r(4, 4, 4, 4), [None, index(4, 2, 4), index(4, 2, 4)], r(4, 2, 4, 4)),
        *[call(aten.index_put.default, r(*_LAST), [index(4, 3)], values, True) for values in (r(1), r(3, 4, 4))],
    ],
    "aten.gather": [
        *[call(aten.gather.default, r(*_LAST), dim, index(4, 4, n, 4)) for dim, n in ((1, 4), (0, 3))],
        *[call(aten.gather.default, r(*_X), dim, at) for dim, at in ((1, index(3, 2, 5, 4)), (-1, index(4, 2, 3, 2)))],
    ],
    "aten.cumsum": [*same(aten.cumsum.default, 1), *same(aten.cumsum.default, -1)],
    "aten.mean": [
        *[one for dims in ([1], [0, -1], []) for one in same(aten.mean.dim, dims)],
        *[*same(aten.mean.dim, [1], True), *same(aten.mean.dim, None, True), *same(aten.mean.default)],
    ],
    "aten.sum": [*same(aten.sum.dim_IntList, [-1]), *same(aten.sum.dim_IntList, [0], True), *same(aten.sum.default)],
    "aten.avg_pool1d": pool(aten.avg_pool1d.default, 1, [2]),
    "aten.avg_pool2d": pool(aten.avg_pool2d.default, 2, [3, 3], [1, 1], [1, 1]),
    "aten.avg_pool3d": pool(aten.avg_pool3d.default, 3, [2, 2, 2]),
    "aten.adaptive_avg_pool1d": pool(aten.adaptive_avg_pool1d.default, 1, [3]),
    "aten.adaptive_avg_pool2d": pool(aten.adaptive_avg_pool2d.default, 2, [4, 4]),
    "aten.adaptive_avg_pool3d": pool(aten.adaptive_avg_pool3d.default, 3, [1, 2, 3]),
    "aten.upsample_nearest1d": resize(aten.upsample_nearest1d.default, 1),
    "aten.upsample_nearest2d": [
        *resize(aten.upsample_nearest2d.default, 2),
        call(aten.upsample_nearest2d.vec, r(2, 4, 4, 4), [4, 4], None),
    ],
    "aten.upsample_linear1d": resize(aten.upsample_linear1d.default, 1, False),
    "aten.upsample_bilinear2d": [
        *resize(aten.upsample_bilinear2d.default, 2, True),
        call(aten.upsample_bilinear2d.vec, r(2, 4, 4, 4), None, False, [2.0, 1.0]),
    ],
    "aten.upsample_bicubic2d": resize(aten.upsample_bicubic2d.default, 2, False),
    "aten._upsample_bicubic2d_aa": resize(aten._upsample_bicubic2d_aa.default, 2, False),
    "aten._upsample_bilinear2d_aa": resize(aten._upsample_bilinear2d_aa.default, 2, False),
    "aten.upsample_trilinear3d": resize(aten.upsample_trilinear3d.default, 3, False),
    "aten.linear": [
        call(aten.linear.default, r(*_X), r(5, 4), r(5)),
        call(aten.linear.default, r(*_LAST), r(4, 4), bias=r(4)),
        call(aten.linear.default, r(*_LAST), r(4, 4)),
        call(aten.linear.default, r(4), r(4, 4), r(4)),
        call(aten.linear.default, r(*_LAST), r(4)),
    ],
    "aten.matmul": [
        call(aten.matmul.default, r(*_X), r(4, 5)),
        call(aten.matmul.default, r(*_LAST), r(*_LAST)),
        call(aten.matmul.default, r(4, 4), r(*_LAST)),
        call(aten.matmul.default, r(*_LAST), r(4)),
        call(aten.matmul.default, r(4), r(*_LAST)),
        call(aten.matmul.default, r(4), r(4)),
        call(aten.matmul.default, r(1, 4, 4), r(4, 4, 4)),
        call(aten.matmul.default, r(3, 1, 4, 4), r(4, 4, 4)),
        call(aten.matmul.default, r(4), r(4, 4)),
        call(aten.matmul.default, r(4, 4), r(4)),
    ],
    "aten.mm": [call(aten.mm.default, r(3, 4), r(4, 5)), call(aten.mm.default, r(4, 4), r(4, 4))],
    "aten.bmm": [call(aten.bmm.default, r(2, 3, 4), r(2, 4, 5)), call(aten.bmm.default, r(*_LAST), r(*_LAST))],
    "aten.addmm": [
        call(aten.addmm.default, r(5), r(3, 4), r(4, 5)),
        call(aten.addmm.default, r(4, 1), r(4, 4), r(4, 4), beta=0.5, alpha=2),
        call(aten.addmm.default, r(4, 4), r(4, 4), r(4, 4)),
    ],
    "aten.baddbmm": [
        call(aten.baddbmm.default, r(4, 1, 4), r(*_LAST), r(*_LAST)),
        call(aten.baddbmm.default, r(2, 3, 5), r(2, 3, 4), r(2, 4, 5)),
    ],
    "aten.embedding": [
        call(aten.embedding.default, r(7, 4), index(7, 2, 3)),
        call(aten.embedding.default, r(4, 4), index(4, 4, 4)),
        call(aten.embedding.default, r(4, 4), index(4, 4)),
    ],
    "aten.conv1d": conv(aten.conv1d.default, 1),
    "aten.conv2d": [
        *conv(aten.conv2d.default, 2),
        call(aten.conv2d.default, r(2, 4, 4, 4), r(4, 2, 1, 1), None, [1, 1], [0, 0], [1, 1], 2),
        call(aten.conv2d.padding, r(2, 4, 4, 4), r(4, 4, 3, 3), r(4), [1, 1], "same"),
    ],
    "aten.conv3d": conv(aten.conv3d.default, 3),
    "aten.conv_transpose1d": conv_transpose(aten.conv_transpose1d.default, 1),
    "aten.conv_transpose2d": conv_transpose(aten.conv_transpose2d.input, 2),
    "aten.conv_transpose3d": conv_transpose(aten.conv_transpose3d.input, 3),
    "aten.scaled_dot_product_attention": [
        call(aten.scaled_dot_product_attention.default, r(2, 3, 4), r(2, 5, 4), r(2, 5, 6)),
        call(aten.scaled_dot_product_attention.default, r(4, 4, 4, 4), r(4, 4, 4, 4), r(4, 4, 4, 4), r(4, 4)),
        call(aten.scaled_dot_product_attention.default, r(4, 4, 4), r(4, 4, 4), r(4, 4, 4), attn_mask=r(4, 4, 4)),
        call(
            aten.scaled_dot_product_attention.default,
            r(2, 4, 4, 4),
            r(2, 4, 4, 4),
            r(2, 4, 4, 4),
            torch.ones(4, 1, 4, dtype=torch.bool),
        ),
        call(aten.scaled_dot_product_attention.default, r(4, 4, 4), r(4, 4, 4), r(4, 4, 4), None, 0.0, True),
        call(aten.scaled_dot_product_attention.default, r(1, 4, 3, 4), r(1, 2, 3, 4), r(1, 2, 3, 4), enable_gqa=True),
        call(aten.scaled_dot_product_attention.default, r(1, 3, 4), r(2, 3, 4), r(2, 3, 4)),
    ],
    "aten._grouped_mm": [
        call(aten._grouped_mm.default, r(4, 4).float(), r(3, 4, 4).float(), _OFFSETS),
        call(aten._grouped_mm.default, r(4, 4).float(), r(4, 4).float(), _OFFSETS),
    ],
    "transformers.grouped_mm_fallback": [
        call(torch.ops.transformers.grouped_mm_fallback.default, r(4, 4), r(3, 4, 4), _OFFSETS),
        call(torch.ops.transformers.grouped_mm_fallback.default, r(4, 5), r(3, 5, 6), _OFFSETS),
    ],
    "aten.einsum": [
        call(aten.einsum.default, "btd,de->bte", [r(2, 3, 4), r(4, 5)]),
        call(aten.einsum.default, "btd,bsd->bts", [r(*_LAST), r(*_LAST)]),
        call(aten.einsum.default, "bte,btd,edk->btk", [r(2, 3, 4), r(2, 3, 5), r(4, 5, 6)]),
        call(aten.einsum.default, "ij,jk", [r(4, 4), r(4, 4)]),
        call(aten.einsum.default, "...d,de->...e", [r(*_LAST), r(4, 4)]),
        call(aten.einsum.default, "bii->bi", [r(*_LAST)]),
        call(aten.einsum.default, "bt , td -> b t d", [r(4, 4), r(4, 4)]),
        call(aten.einsum.default, "bd,d->bd", [r(4, 4), r(1)]),
    ],
    "aten.zeros": [call(aten.zeros.default, [2, 3])],
    "aten.zeros_like": [call(aten.zeros_like.default, r(*_X))],
    "aten.new_zeros": [call(aten.new_zeros.default, r(*_X), [4, 4])],
    "aten.full": [call(aten.full.default, [3, 4], 2.0), call(aten.full.default, [3, 4], 0)],
    "aten.full_like": [call(aten.full_like.default, r(*_X), 2.0), call(aten.full_like.default, r(*_X), 0)],
    "aten.new_full": [call(aten.new_full.default, r(*_X), [4, 4], 2.0), call(aten.new_full.default, r(*_X), [4, 4], 0)],
}
"""Row of the op table -> calls. Dimensions are often equal: an axis taken for another is then not told by its size."""
