"""Values of inputs, known while a model runs on tensors without values.

On the meta device nothing has values, so a model that asks for one, such as the rows and columns of a packed image
(``grid_thw.tolist()``), the number of placeholders in a text or the tokens that a mask picks, cannot be traced. The
inputs of a probe are known, though. :class:`KnownValues` remembers them, computes beside the model whatever
follows from known values alone, on the CPU, and answers where otherwise an unknown value would stop the trace:

- a number that Python asks for (``item``, ``tolist``, ``bool``, ``int``, an index, a size),
- a result whose *shape* depends on values (``nonzero``, ``unique``, a boolean mask as an index). What a mask picks of
  floating numbers stays a part of the input: the positions alone are known then.

Nothing else changes: all other operations are traced as they are, and a graph that could be traced without known values
is the same with them. What is proved of such a graph holds for these values, as it holds for the traced sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from normconvert.compat.lean_export import noted
from normconvert.compat.torch import (
    DataDependentOutputException,
    DisableTorchFunction,
    DynamicOutputShapeException,
    TorchDispatchMode,
    pytree,
    without_modes,
)
from normconvert.tracing.in_place_writes import MARKER
from normconvert.tracing.operands import FACTS, operands
from normconvert.tracing.tensor_memory import memory_of, writes_to

UNKNOWN_VALUE = (DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode)
"""What is raised where a model goes on by a value that nobody knows, such as one that weights give."""

LARGEST = 1 << 22
"""Elements of the largest tensor whose values are followed."""

_EMPTY = ("empty", "new_empty")
"""How the names of functions begin whose results are to be written to; until then any value is as good as another."""

_ANSWERS = frozenset(
    ("item", "tolist", "numpy", "equal", "allclose", "is_nonzero", "__bool__", "__int__", "__float__", "__index__",
     "__contains__")
)  # fmt: skip
"""Functions that leave tensors behind: Python code goes on with the number."""

_BY_VALUE = frozenset(("nonzero", "argwhere", "unique", "unique_consecutive", "bincount", "masked_select"))
"""Functions whose result's shape depends on values."""

_SIZES = frozenset(
    ("arange", "linspace", "zeros", "ones", "full", "tensor", "as_tensor", "new_tensor", "empty", "new_zeros",
     "new_ones", "new_full", "view", "reshape", "expand", "repeat", "tile", "split", "tensor_split", "narrow", "pad",
     "split_with_sizes", "unflatten", "roll", "interpolate", "repeat_interleave", "chunk", "broadcast_to", "select",
     "avg_pool2d", "adaptive_avg_pool2d")
)  # fmt: skip
"""Functions that take numbers where a model may give them tensors of one element."""

_FACTORIES = frozenset(("arange", "tensor", "as_tensor", "zeros", "ones", "full", "linspace", "eye", "empty"))
"""Functions that make tensors of numbers."""

_FILLED = {"new_zeros": 0, "new_ones": 1, "zeros_like": 0, "ones_like": 1}
"""Functions whose result's values do not depend on those of the tensor that they take shape or dtype from."""


class KnownValues(TorchFunctionMode):
    """While it is in force, tensors made of known values alone have their values here.

    Args:
        largest: elements of the largest tensor whose values are followed.
        integers: follow tensors of integers and truth values only.
    """

    def __init__(self, largest: int = LARGEST, integers: bool = False) -> None:
        super().__init__()
        self._largest, self._integers = largest, integers
        # By identity, as == compares elements, and weakly, since what a model has dropped needs no value.
        self._values = WeakTensorKeyDictionary()  # tensor -> _Known

    def note(self, tensor: Tensor, value: Tensor) -> None:
        """Remember the values of a tensor.

        Args:
            tensor: meta or fake, as the model gets it.
            value: on the CPU, of the same shape.
        """
        with _real():
            # A copy, since what the model writes to its input is written to this as well.
            self._remember(tensor, value.detach().clone())

    def value(self, tensor: object) -> Tensor | None:
        """The values of a tensor, on the CPU; None if they are unknown, or were written to by what is unknown."""
        known = self._known(tensor)
        return None if known is None else known.value

    def _known(self, tensor: object) -> _Known | None:
        known: _Known | None = self._values.get(tensor) if isinstance(tensor, Tensor) else None
        if known is None or not isinstance(tensor, Tensor) or known.version != writes_to(tensor):
            return None
        return known

    def _remember(self, tensor: Tensor, value: Tensor) -> None:
        version = writes_to(tensor)
        # Without a count of writes, or memory to find the views by, nothing would say when the value is out of date.
        if version >= 0 and memory_of(tensor) and memory_of(value):
            self._values[tensor] = _Known(value, version)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in FACTS:
            return func(*args)
        name = getattr(func, "__name__", "")
        args, kwargs = self._with_numbers(name, args, kwargs or {})
        if func is MARKER and self._known(args[0]) is None:
            return noted(MARKER, *args)  # a quarter of all operations
        call = _Call(func, name, args, kwargs, operands(args, kwargs))
        return self._handler(call)(call)

    def _handler(self, call: _Call) -> Callable[[_Call], Any]:
        """What is to be done about a call: the first that applies."""
        # torch does not count what is written through these
        if call.func == Tensor.data.__get__ or call.name == "__set__":  # type: ignore[attr-defined]
            return self._uncounted
        if call.name in _FILLED and call.tensors and self.value(call.tensors[0]) is None:
            return self._filled
        if any(self._known(tensor) is None for tensor in call.tensors):
            return self._partly
        # What neither takes nor makes a tensor may be a switch, which must not be thrown twice.
        if not call.tensors and call.name not in _FACTORIES:
            return _Call.run
        if call.name == "__iter__":
            return self._rows
        if call.name == "__getitem__" and call.args[0].is_floating_point() and self._by_mask(call.args[1]):
            return self._picked
        if call.name in _ANSWERS or self._shape_by_value(call.name, call.args, call.kwargs):
            return self._answer
        return self._followed

    def _uncounted(self, call: _Call) -> Any:
        """A call that may write to its operands unseen."""
        for tensor in call.tensors:
            self._forget(tensor)
        return call.run()

    def _rows(self, call: _Call) -> Any:
        """Python goes through the rows of a known tensor."""
        made = call.args[0].unbind(0)
        with _real():
            found = self._values[call.args[0]].value.unbind(0)
        return iter(self._noted(made, found, call.tensors))

    def _answer(self, call: _Call) -> Any:
        """The number, or the result of a known shape, where the model would stop without."""
        result = self._compute(call)
        if result is _UNKNOWN:
            return call.run()
        return pytree.tree_map(lambda leaf: self._constant(leaf, call.tensors[0].device), result)

    def _picked(self, call: _Call) -> Any:
        """What a mask picks of an image: the mask's positions are known, and the numbers are the input's as before."""
        made, result = self._partly(call), self._compute(call)
        return made if result is _UNKNOWN else self._noted(made, result, call.tensors)

    def _followed(self, call: _Call) -> Any:
        """The call as it is, with the values of its results remembered."""
        held = [(tensor, self._values[tensor]) for tensor in call.tensors]
        made = call.run()
        if any(map(self._is_passed_over, pytree.tree_leaves(made))):
            return made  # a mask over all positions, say: not worth its memory
        result = self._compute(call)
        if result is _UNKNOWN:
            return made
        # The same trace every time: fresh memory may hold anything.
        if call.name.startswith(_EMPTY) and isinstance(result, Tensor):
            with _real():
                result.zero_()
        for tensor, known in held:
            if known.version != writes_to(tensor):
                # The write was followed on the values too, so they hold at the new count.
                self._written(known)
        return self._noted(made, result, call.tensors)

    def _with_numbers(self, name: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Known tensors of one element as numbers, where a function wants numbers."""

        def number(leaf: Any) -> Any:
            value = self.value(leaf)
            # A truth value stays a tensor: as an index it is a mask and no number.
            if value is None or value.ndim or value.is_floating_point() or value.dtype == torch.bool:
                return leaf
            with _real():
                return value.item()

        if name in ("__getitem__", "__setitem__") and len(args) > 1:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            items = tuple(
                slice(number(i.start), number(i.stop), number(i.step)) if isinstance(i, slice) else number(i)
                for i in index
            )
            return (args[0], items if isinstance(args[1], tuple) else items[0], *args[2:]), kwargs
        if name in _SIZES:
            # The first operand is what the function works on, unless it makes a tensor of numbers.
            first = () if name in _FACTORIES else args[:1]
            rest = args[len(first) :]
            if name == "repeat_interleave":  # a tensor of repeats of one element stays what it is
                return args, kwargs
            return (*first, *pytree.tree_map(number, rest)), pytree.tree_map(number, kwargs)
        return args, kwargs

    def _compute(self, call: _Call) -> Any:
        """The function on the known values; :data:`_UNKNOWN` if it cannot run on them."""

        def real(leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                return self._values[leaf].value
            return torch.device("cpu") if isinstance(leaf, torch.device) else leaf

        args, kwargs = pytree.tree_map(real, (call.args, call.kwargs))
        if "device" in kwargs:
            kwargs = {**kwargs, "device": "cpu"}
        devices = ("meta", "cuda", "cpu")
        args = tuple("cpu" if isinstance(a, str) and a.partition(":")[0] in devices else a for a in args)
        if any(isinstance(leaf, torch.SymInt) for leaf in pytree.tree_leaves((args, kwargs))):
            return _UNKNOWN
        try:
            with _real(), _Determined():
                return call.func(*args, **kwargs)
        except Exception:  # whatever a function says of arguments that it takes on other devices only
            return _UNKNOWN

    def _noted(self, made: Any, values: Any, operands: Sequence[Tensor]) -> Any:
        """``made``, with the values of its tensors remembered."""
        theirs = {memory_of(self._values[tensor].value) for tensor in operands}
        shared = {memory_of(tensor) for tensor in operands}
        tensors, found = pytree.tree_leaves(made), pytree.tree_leaves(values)
        if len(tensors) == len(found):
            for tensor, value in zip(tensors, found, strict=True):
                fits = isinstance(tensor, Tensor) and isinstance(value, Tensor) and tensor.shape == value.shape
                if fits and tensor.dtype == value.dtype and value.numel() <= self._largest:
                    # A copy in the model must be no view here, or would be written to with the other.
                    if memory_of(value) in theirs and memory_of(tensor) not in shared:
                        with _real():
                            value = value.clone()
                    self._remember(tensor, value)
        return made

    def _is_passed_over(self, leaf: object) -> bool:
        """Whether a result is a tensor whose values are not followed; one of unknown size is."""
        if not isinstance(leaf, Tensor):
            return False
        count: Any = leaf.numel()
        return (
            not isinstance(count, int)
            or count > self._largest
            or (self._integers and (leaf.is_floating_point() or leaf.is_complex()))
        )

    def _filled(self, call: _Call) -> Any:
        """A result that is one number everywhere, whatever its shape and dtype were taken from."""
        made = call.run()
        if isinstance(made, Tensor) and not made.is_floating_point() and not self._is_passed_over(made):
            with _real():
                self._remember(made, torch.full(tuple(made.shape), _FILLED[call.name], dtype=made.dtype))
        return made

    def _constant(self, value: Any, device: torch.device) -> Any:
        """A tensor with these values that the model can go on with."""
        if not isinstance(value, Tensor):
            return value
        with _real():
            listed = value.tolist()
        # reshape, since the list of a tensor without elements does not tell its shape.
        made = torch.tensor(listed, dtype=value.dtype).reshape(value.shape).to(device)
        self._remember(made, value)
        return made

    def _partly(self, call: _Call) -> Any:
        """A call with unknown operands, whose result's shape may follow from the known ones."""
        name, args, kwargs = call.name, call.args, call.kwargs
        if name in ("__getitem__", "__setitem__") and len(args) > 1 and self._by_mask(args[1]):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            positions = tuple(part for i in index for part in self._positions(i, args[0].device))
            return call.func(args[0], positions, *args[2:], **kwargs)
        masks = name == "masked_select" and len(args) == 2 and _is_mask(self.value(args[1]))
        # A mask that is stretched would have other positions.
        if masks and args[0].shape == args[1].shape:
            return args[0][self._positions(args[1], args[0].device)]
        if name == "repeat_interleave" and len(args) > 1 and self.value(args[1]) is not None and args[1].ndim == 1:
            dim = args[2] if len(args) > 2 else kwargs.get("dim")
            if dim is not None and args[0].shape[dim] == len(args[1]):
                with _real():
                    repeats = self.value(args[1])
                    assert repeats is not None
                    chosen = torch.arange(len(repeats)).repeat_interleave(repeats)
                return args[0].index_select(dim, self._constant(chosen, args[0].device))
        return call.run()

    def _shape_by_value(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether the shape of a call's result depends on the values of its operands."""
        if name == "where":
            return len(args) + len(kwargs) == 1
        if name == "repeat_interleave":
            return any(isinstance(a, Tensor) for a in (*args[1:], kwargs.get("repeats")))
        return self._by_mask(args[1]) if name == "__getitem__" else name in _BY_VALUE

    def _by_mask(self, index: Any) -> bool:
        """Whether an index has a known mask in it."""
        return any(_is_mask(self.value(i)) for i in (index if isinstance(index, tuple) else (index,)))

    def _positions(self, index: Any, device: torch.device) -> tuple[Any, ...]:
        """One part of an index, a known mask as the positions it picks."""
        value = self.value(index)
        if not _is_mask(value):
            return (index,)
        assert value is not None
        with _real():
            found = value.nonzero(as_tuple=True)
        return tuple(self._constant(part, device) for part in found)

    def _written(self, changed: _Known) -> None:
        """A known tensor was written to, with known values: the tensors that share its memory are known still."""
        with _real():
            for tensor, known in list(self._values.items()):
                # Of the names of this memory only those that were right before the write are right after it.
                if known.version == changed.version and memory_of(known.value) == memory_of(changed.value):
                    self._remember(tensor, known.value)

    def _forget(self, tensor: Tensor) -> None:
        """Drop what is known of a tensor, and of all that share its memory."""
        with _real():
            for other in list(self._values):
                if memory_of(other) == memory_of(tensor):
                    del self._values[other]


class _Call(NamedTuple):
    """A function and its operands, ``tensors`` those among them that are tensors."""

    func: Callable[..., Any]
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tensors: Sequence[Tensor]

    def run(self) -> Any:
        return self.func(*self.args, **self.kwargs)


class _Determined(TorchDispatchMode):
    """Refuses operations whose results are drawn: the same call of the model would draw others."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise ValueError(f"{func} draws random numbers")
        return func(*args, **(kwargs or {}))


class _Known(NamedTuple):
    """The values of a tensor, and the number of writes to its memory, which all its views count together."""

    value: Tensor
    version: int


@contextmanager
def known_values(
    inputs: Mapping[str, Any], given: Mapping[str, Any], others: Iterable[tuple[Tensor, Tensor]] = ()
) -> Iterator[None]:
    """Values are known within.

    Args:
        inputs: name -> what the model is called with; tensors on the CPU have values, those on the meta device none.
        given: the same names -> the tensors without values that the model gets instead.
        others: further tensors without values, and their values.
    """
    known = KnownValues()
    names = [name for name in inputs if name in given]
    leaves = [pytree.tree_leaves([table[name] for name in names]) for table in (given, inputs)]
    for stands_in, value in zip(*leaves, strict=True):
        if isinstance(value, Tensor) and not value.is_meta and isinstance(stands_in, Tensor):
            known.note(stands_in, value)
    for tensor, value in others:
        known.note(tensor, value)
    with known:
        yield


_UNKNOWN = object()


@contextmanager
def _real() -> Iterator[None]:
    """Compute with real values, whatever traces the model."""
    with without_modes(), DisableTorchFunction(), torch.no_grad():
        yield


def _is_mask(value: Tensor | None) -> bool:
    return value is not None and value.dtype == torch.bool and value.ndim > 0
