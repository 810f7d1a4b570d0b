"""A model copied whole, with what its modules have worked out from their parameters."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from normconvert.compat.torch import pytree

Model = TypeVar("Model", bound=nn.Module)
_TABLES = ("_parameters", "_buffers", "_modules")


def copy_model(model: Model, shared: Iterable[Tensor] = (), made: Mapping[int, Tensor] | None = None) -> Model:
    """A deep copy of ``model``, whose dtypes, ties and hooks are as there; it holds the ``shared`` tensors themselves.

    ``made`` gives tensors that stand for others in the copy, by the identity of these.

    torch copies no tensor that was computed with gradients, and some modules keep one: the old
    ``torch.nn.utils.weight_norm`` leaves the last weight it worked out beside the parameters it is worked out from.
    """
    computed = (value for _, _, _, value in plain_tensors(model) if not value.is_leaf)
    memo: dict[int, Any] = {id(value): value.detach().clone() for value in computed}
    memo.update((id(value), value) for value in shared)
    memo.update(made or {})
    return copy.deepcopy(model, memo)


def plain_tensors(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """(path, module, attribute, tensor) of what modules hold beside parameters and buffers, in containers as well."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name not in _TABLES and isinstance(value, (Tensor, dict, list, tuple)):
                leaves = pytree.tree_leaves(value)
                yield from ((path, module, name, one) for one in leaves if isinstance(one, Tensor))
