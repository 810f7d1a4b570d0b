"""Weights that are read when an operation asks for them and freed right after, and calls that share each reading.

A :class:`LazyWeight` stands where a parameter stands. Any operation that takes it is done on the value it makes at that
moment, whoever calls it: a module's own forward, another module that borrows the weight (a tied head, torch's
attention), a function. So a model of any architecture runs with one weight in memory at a time.

Several calls of the model (the probes) go through it in turns (:func:`in_turns`): each runs until it wants a weight
that is not there, then the next one runs. When all are waiting, the weight that the hindmost of them waits for is made
once and handed to all who want it. What stays in memory between the turns is the hidden states.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from normconvert.compat.torch import HIDDEN_ATTRIBUTES, DisableTorchFunctionSubclass, pytree, wrapper

T = TypeVar("T")


class Values(Protocol):
    """Where the value of a weight comes from."""

    @property
    def piece(self) -> int | None:
        """Bytes of a matrix that a linear map may take at once; None: it takes the whole."""

    def whole(self) -> Tensor:
        """The value."""

    def part(self, start: int, stop: int) -> Tensor | None:
        """Its rows from ``start`` to ``stop``; None if they cannot be made without the others."""

    def rows(self, index: Tensor) -> Tensor:
        """The rows that ``index`` (one dimension, on the CPU) names."""


# What is known of a weight without its value: answered by the tensor that stands in for it.
_KNOWN = frozenset(
    {
        *(
            getattr(Tensor, name).__get__
            for name in (
                "shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf", "grad", "grad_fn", "is_cpu",
                "is_cuda", "is_meta", "is_sparse", "is_quantized", "is_mps", "is_xpu", "is_mkldnn", "is_nested",
                "itemsize", "nbytes", "names", *HIDDEN_ATTRIBUTES,
            )
            if hasattr(Tensor, name)
        ),
        Tensor.size, Tensor.stride, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.ndimension, Tensor.element_size,
        Tensor.is_floating_point, Tensor.is_complex, Tensor.is_contiguous, Tensor.get_device, Tensor.__hash__,
        Tensor.__len__, Tensor.__repr__, Tensor.requires_grad_, Tensor.is_signed, Tensor.is_inference,
        torch.is_floating_point, torch.is_complex, torch.numel, torch.is_inference,
    }
)  # fmt: skip


class LazyWeight(Tensor):
    """A parameter without its value; shape, dtype and device are those that the value will have.

    Args:
        values: makes the value.
        shape: of the value.
        dtype: of the value.
        device: where it is needed.
    """

    origin: Values

    @staticmethod
    def __new__(
        cls: type[LazyWeight], values: Values, shape: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> LazyWeight:
        """The stand-in."""
        lazy = wrapper(cls, shape, dtype, device)
        lazy.origin = values
        return lazy

    def value(self) -> Tensor:
        """The value, of the shape and dtype that the stand-in says, on its device."""
        return _take((id(self), None), lambda: self._checked(self.origin.whole(), tuple(self.shape)))

    def part(self, start: int, stop: int) -> Tensor | None:
        """Rows of the value, see :class:`Values`."""
        made = _take((id(self), start), lambda: self.origin.part(start, stop))
        return None if made is None else self._checked(made, (stop - start, *self.shape[1:]))

    def rows(self, index: Tensor) -> Tensor:
        """Rows of the value, in the order of ``index``; nobody else wants the same ones, so no turn ends here."""
        return self._checked(self.origin.rows(index.cpu()), (len(index), *self.shape[1:]))

    def _checked(self, made: Tensor, shape: tuple[int, ...]) -> Tensor:
        assert tuple(made.shape) == shape, (tuple(made.shape), shape)
        assert made.dtype == self.dtype
        return made.to(self.device)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every operation of torch that is given such a weight comes here first."""
        kwargs = kwargs or {}
        if func in _KNOWN:
            with DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is Tensor.detach:
            return args[0]
        name = getattr(func, "__name__", "")
        if isinstance(args[0] if args else None, LazyWeight) and (
            name == "__set__" or (name.endswith("_") and not name.endswith("__"))
        ):
            raise RuntimeError(f"{name} changes a weight in place: verify this model without --max-memory")
        if func in _BY_ROWS:
            found = _BY_ROWS[func](*args, **kwargs)
            if found is not None:
                return found
        return func(*_materialise(args), **_materialise(kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """What reaches the dispatcher past ``__torch_function__``: calls from C++ and from scripted functions."""
        return func(*_materialise(args), **_materialise(kwargs or {}))


def _materialise(tree: Any) -> Any:
    return pytree.tree_map(lambda x: x.value() if isinstance(x, LazyWeight) else x, tree)


def _embedding(
    input: Tensor, weight: Any, padding_idx: Any = None, max_norm: Any = None, *rest: Any, **options: Any
) -> Tensor | None:
    """An embedding table is read only where it is looked up."""
    if not isinstance(weight, LazyWeight) or max_norm is not None:
        return None
    index, places = input.unique(return_inverse=True)
    # Rows are looked up by indexing, which takes negative numbers; an embedding refuses them.
    if len(index) and not 0 <= int(index[0]) <= int(index[-1]) < weight.shape[0]:
        raise IndexError("index out of range in self")  # as torch says it
    return F.embedding(places, weight.rows(index))


def _linear(input: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor | None:
    """A matrix too large for the memory is applied some rows at a time."""
    if not isinstance(weight, LazyWeight) or weight.ndim != 2 or weight.origin.piece is None:
        return None
    step = max(1, weight.origin.piece // (weight.shape[1] * weight.dtype.itemsize))
    if step >= weight.shape[0]:
        return None
    whole = _materialise(bias)
    results = []
    for start in range(0, weight.shape[0], step):
        stop = min(start + step, weight.shape[0])
        part = weight.part(start, stop)
        if part is None:
            return None
        results.append(F.linear(input, part, None if whole is None else whole[start:stop]))
        del part
    return torch.cat(results, -1)


_BY_ROWS: dict[Any, Callable[..., Tensor | None]] = {F.embedding: _embedding, F.linear: _linear}
"""Operations that need less of a weight than the whole; they return None where they do not know how."""


class _Call(threading.Thread):
    """One call among several that take turns; only one of them, or the one who directs them, runs at a time."""

    def __init__(self, run: Callable[[], Any], back: threading.Semaphore) -> None:
        # After an error the others wait for weights that nobody makes: they must not keep the process alive.
        super().__init__(daemon=True)
        self.call, self.back = run, back
        self.go = threading.Semaphore(0)
        self.random = torch.get_rng_state()
        self.wanted: tuple[Any, Callable[[], Any]] | None = None
        self.given: Any = None
        self.taken = 0
        self.result: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        """The thread's body."""
        self.go.acquire()
        _CURRENT.call = self
        try:
            self.result = self.call()
        except BaseException as error:  # whoever directs raises it
            self.error = error
        self.wanted = None
        self.back.release()

    def resume(self, given: Any = None) -> None:
        """Let the call run until it wants a weight or ends; torch's random numbers are its own meanwhile."""
        self.given = given
        torch.set_rng_state(self.random)
        self.go.release()
        self.back.acquire()
        self.random = torch.get_rng_state()

    def take(self, key: Any, make: Callable[[], Any]) -> Any:
        """Called in the thread: wait until what ``make`` returns is there."""
        self.wanted = (key, make)
        self.back.release()
        self.go.acquire()
        given, self.given = self.given, None
        if isinstance(given, BaseException):
            raise given
        return given


_CURRENT = threading.local()


def _take(key: Any, make: Callable[[], Tensor | None]) -> Any:
    call: _Call | None = getattr(_CURRENT, "call", None)
    return make() if call is None else call.take(key, make)


def in_turns(calls: Sequence[Callable[[], T]]) -> list[T]:
    """The results of ``calls``, which run interleaved: each weight that they want is made once for all of them.

    Raises:
        Exception: the first that a call or the making of a weight raised.
    """
    back = threading.Semaphore(0)
    before = torch.get_rng_state()
    threads = [_Call(call, back) for call in calls]
    try:
        for thread in threads:
            thread.start()
            thread.resume()
        while waiting := [thread for thread in threads if thread.wanted is not None]:
            _serve(waiting)
    finally:
        torch.set_rng_state(before)
    for thread in threads:
        if thread.error is not None:
            raise thread.error
    return [thread.result for thread in threads]


def _serve(waiting: Sequence[_Call]) -> None:
    """Make what the hindmost waits for, and let all go on who wait for the same."""
    # Not the foremost: it would run ahead, and each weight be read once for it and once more for the others.
    wanted = min(waiting, key=lambda thread: thread.taken).wanted
    assert wanted is not None
    key, make = wanted
    given: Any
    try:
        given = make()
    except Exception as error:
        given = error
    for thread in waiting:
        if thread.wanted is not None and thread.wanted[0] == key:
            thread.taken += 1
            thread.resume(given)
