"""Integers that a model's constructor works out and keeps in buffers which no checkpoint holds.

A codec keeps the strides of its convolutions in such buffers and decides by them how much to pad. On the meta device
they have no values, although every model of that configuration has the same ones. So the constructor is followed: what
it makes of numbers alone is computed beside it, on the CPU, and the buffers of the skeleton are these tensors.

A buffer that a checkpoint holds is no constant, and neither is one that ``forward`` writes to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from normconvert.tracing.known_values import KnownValues

LARGEST = 1 << 12
"""Elements of the largest buffer whose values are kept."""


@contextmanager
def following_integers() -> Iterator[Callable[[nn.Module], None]]:
    """Build a model on the meta device within; the result, called with it, gives its constant buffers their values."""
    values = KnownValues(LARGEST, integers=True)

    def fill(model: nn.Module) -> None:
        memory: dict[int, set[int]] = {}
        known = [(path, b, v) for path, b in _unstored(model) if (v := values.value(b)) is not None]
        for _, buffer, value in known:
            memory.setdefault(value.untyped_storage().data_ptr(), set()).add(id(buffer))
        made: dict[int, Tensor] = {}
        for path, buffer, value in known:
            alone = len(memory[value.untyped_storage().data_ptr()]) == 1  # no other buffer is a view of it
            if alone and value.shape == buffer.shape and value.dtype == buffer.dtype:
                # By identity, so that a buffer of two modules stays one.
                holder, _, name = path.rpartition(".")
                setattr(model.get_submodule(holder), name, made.setdefault(id(buffer), value.clone()))

    with values:
        yield fill


def constant_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Name -> values of the buffers of ``model`` that are constants and have values."""
    return {path: b for path, b in _unstored(model) if not b.is_meta and b.numel() <= LARGEST}


def in_place(model: nn.Module, constants: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """(the tensor that the model has there now, its values) for each of the constants."""
    for name, value in constants.items():
        yield model.get_buffer(name), value


def without_changed(model: nn.Module, constants: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """The constants that are none of the named buffers, by whatever name those go."""
    changed = {id(model.get_buffer(name)) for name in names}
    return {name: value for name, value in constants.items() if id(value) not in changed}


def _unstored(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of the buffers of integers that no checkpoint holds; a shared one has several names."""
    stored = model.state_dict(keep_vars=True)
    for path, buffer in model.named_buffers(remove_duplicate=False):
        if path not in stored and not buffer.is_floating_point() and not buffer.is_complex():
            yield path, buffer
