"""The plan replayed in float64: the model that the result has to be, but for the rounding of its weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from functools import partial

import torch
from torch import Tensor, nn

from normconvert.apply.memory import in_float64
from normconvert.apply.workers import in_order
from normconvert.errors import InputError
from normconvert.plan.conversion_plan import Plan
from normconvert.plan.edits import Edit, apply_edits, edited_shape, refuse_oversized
from normconvert.rewrites.ties import set_as_taken, switches
from normconvert.tracing.model_copy import copy_model

See = Callable[[str, Tensor | None], Callable[[Tensor], None]]
"""Called with the name of a tensor and what it is (None: it is new), and what that returns with the edited one.

By several threads.
"""

SMALL = 1 << 17
"""Elements of a tensor that is kept as it was, for other tensors' edits, where it is edited in its own memory."""


def algebra_model(
    truth: nn.Module, plan: Plan, *, share: bool = False, spend: bool = False, seen: See | None = None
) -> nn.Module:
    """A copy of the float64 model with the plan's tensor edits and module edits applied.

    Args:
        truth: the original in float64; unchanged. Edits look up *its* tensors, so that their order does not matter.
        plan: names of tensors as in ``truth.state_dict()``.
        share: parameters that the plan leaves as they are stay those of `truth` itself, in no memory of their own.
        spend: so do those that it edits, where that can be: `truth` is good for nothing afterwards.
        seen: told of each edited tensor.

    Raises:
        InputError: the plan names a tensor or a module that the model does not have, or one of another shape.
    """
    from normconvert.runtime import apply_module_edits

    source = named_tensors(truth)
    changed = {id(source[name]) for name in plan.tensors if name in source}
    model = copy_model(truth, made=_shared(truth, changed) if share or spend else {})
    try:
        apply_module_edits(model, plan.modules)
    except (ValueError, AttributeError) as error:
        raise InputError(f"the plan does not fit the model: {error}") from error
    set_as_taken(model, switches(plan))
    target = named_tensors(model)
    largest = max((tensor.numel() for tensor in source.values()), default=0)
    for name, edits in plan.tensors.items():
        refuse_oversized(name, edits, largest)
    replay = _Replay(source, plan.tensors, spend, seen)
    for names in replay.rounds:
        for name, value in in_order(partial(replay.edited, name) for name in names):
            # Untied or new: nobody else has it.
            if _is_made(plan.tensors[name], "copy") or name not in target:
                _set_parameter(model, name, value)
            else:
                target[name].data = value  # the shared Parameter itself: every name that is tied to it sees the edit
    return model.eval()


def _is_made(edits: Sequence[Edit], *how: str) -> bool:
    return bool(edits) and edits[0]["op"] in how


class _Replay:
    """The edits of a plan, of tensors in float64.

    Attributes:
        rounds: names, to be done in one round after the other; within one, in any order.
    """

    def __init__(
        self, source: Mapping[str, Tensor], plan: Mapping[str, Sequence[Edit]], spend: bool, seen: See | None
    ) -> None:
        self._source, self._plan, self._seen = source, plan, seen
        self._kept: dict[str, Tensor] = {}
        self._in_place: Set[str] = frozenset()
        self.rounds: tuple[Sequence[str], ...] = (list(plan),)
        if spend:
            self._spend()

    def edited(self, name: str) -> tuple[str, Tensor]:
        """The name of a tensor, and what the plan makes of it."""
        edits, old = self._plan[name], self._old(name)
        tell = self._seen(name, self._source.get(name)) if self._seen is not None else None
        try:
            own = old if name in self._in_place or _is_made(edits, "copy", "new") else in_float64(old)
            value = apply_edits(own, edits, self._lookup, own=True).to(old.device)
        except (RuntimeError, ValueError, IndexError) as error:
            raise self._unfit(name, error) from error
        if tell is not None:
            tell(value)
        return name, value

    def _old(self, name: str) -> Tensor:
        if name not in self._source and _is_made(self._plan[name], "copy", "new"):
            return torch.empty(0)
        return self._tensor(name)

    def _tensor(self, name: str) -> Tensor:
        if name not in self._source:
            raise InputError(
                f"the plan names the tensor {name!r}, which the model does not have: is it another model's?"
            )
        return self._source[name]

    def _lookup(self, name: str) -> Tensor:
        return self._kept[name] if name in self._kept else self._tensor(name)

    def _unfit(self, name: str, error: Exception) -> InputError:
        return InputError(f"the plan does not fit the tensor {name!r}: {error}")

    def _spend(self) -> None:
        """Decide which tensors are edited where they lie, such that no edit reads what another one has written."""
        reads = {name: self._reads(name) for name in self._plan}
        read = set().union(*reads.values())
        self._kept = {name: self._source[name].clone() for name in read if self._source[name].numel() <= SMALL}
        large = {self._place(name) for name in read if name not in self._kept}
        # Those that read large tensors are done before any of these is written to.
        first = [name for name, those in reads.items() if any(self._place(other) in large for other in those)]
        self.rounds = (first, [name for name in self._plan if name not in set(first)])
        # Of memory that several share each may be edited otherwise, or not at all.
        holders = Counter(self._place(name) for name in dict.fromkeys(self._names()))
        written = [name for name, edits in self._plan.items() if not _is_made(edits, "copy", "new")]
        edited = Counter(self._place(name) for name in written)
        self._in_place = {
            name
            for name in written
            if holders[self._place(name)] == edited[self._place(name)] == 1
            and (name not in first or self._place(name) not in large)
            and self._source[name].dtype == torch.float64
            and self._source[name].is_contiguous()
        }

    def _names(self) -> list[str]:
        """A name for each tensor: tied ones are one."""
        return list({id(tensor): name for name, tensor in self._source.items()}.values())

    def _place(self, name: str) -> int:
        return self._source[name].untyped_storage().data_ptr()

    def _reads(self, name: str) -> set[str]:
        """The tensors that the edits of one look up."""
        found: set[str] = set()

        def shape_of(other: str) -> Sequence[int]:
            found.add(other)
            return self._tensor(other).shape

        try:
            edited_shape(self._old(name).shape, self._plan[name], shape_of)
        except (RuntimeError, ValueError, IndexError) as error:
            raise self._unfit(name, error) from error
        return found


def _shared(model: nn.Module, changed: Set[int]) -> dict[int, Tensor]:
    """What stands for the parameters in a copy that takes no memory for them.

    Those that are to be ``changed`` (by identity) are another Parameter on the same memory: they get other memory.
    """
    found: dict[int, Tensor] = {}
    for parameter in model.parameters():
        if id(parameter) not in changed:
            found[id(parameter)] = parameter
        elif type(parameter) is nn.Parameter:  # of a subclass nobody knows what it holds
            other = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
            vars(other).update(vars(parameter))
            found[id(parameter)] = other
    return found


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name, tied ones under each of their names."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def _set_parameter(model: nn.Module, name: str, value: Tensor) -> None:
    """Give the name a Parameter of its own."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    owner.register_parameter(leaf, nn.Parameter(value, requires_grad=False))
