"""A model copied whole, with what its modules have worked out from their parameters."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TypeVar

from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


def copy_model(model: Model, shared: Iterable[Tensor] = ()) -> Model:
    """A deep copy of ``model``, whose dtypes, ties and hooks are as there; it holds the ``shared`` tensors themselves.

    torch copies no tensor that was computed with gradients, and some modules keep one: the old
    ``torch.nn.utils.weight_norm`` leaves the last weight it worked out beside the parameters it is worked out from.
    """
    computed = (v for m in model.modules() for v in vars(m).values() if isinstance(v, Tensor) and not v.is_leaf)
    made: dict[int, object] = {id(value): value.detach().clone() for value in computed}
    made.update((id(value), value) for value in shared)
    return copy.deepcopy(model, made)
