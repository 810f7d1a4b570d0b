"""The plan replayed in float64: the model that the result has to be, but for the rounding of its weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from functools import partial

import torch
from torch import Tensor, nn

from normconvert.apply.memory import in_float64
from normconvert.apply.workers import in_order
from normconvert.errors import InputError
from normconvert.plan.conversion_plan import Plan
from normconvert.plan.edits import SMALL, Edit, apply_edits, referred, refuse_oversized
from normconvert.rewrites.ties import set_as_taken, switches
from normconvert.tracing.model_copy import copy_model

Seen = Callable[[str, Tensor], None]
"""Called with each edited tensor, by several threads."""

AT_A_TIME = 8
"""Tensors that are edited side by side, if there are as many cores: what comes of them stays in memory in any case."""


def algebra_model(
    truth: nn.Module,
    plan: Plan,
    *,
    share: bool = False,
    spend: bool = False,
    others: Iterable[Tensor] = (),
    seen: Seen | None = None,
) -> nn.Module:
    """A copy of the float64 model with the plan's tensor edits and module edits applied.

    Args:
        truth: the original in float64; unchanged. Edits look up *its* tensors, so that their order does not matter.
        plan: names of tensors as in ``truth.state_dict()``.
        share: parameters that the plan leaves as they are stay those of `truth` itself, in no memory of their own.
        spend: so do those that it edits, where that can be: `truth` is good for nothing afterwards.
        others: what is in use beside `truth`: memory of these is not spent.
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
    replay = _Replay(source, plan.tensors, seen)
    if spend:
        replay.spend(others)
    for names in replay.rounds:
        for name, value in in_order((partial(replay.edited, name) for name in names), AT_A_TIME):
            # Untied or new: nobody else has it.
            if _begins_with(plan.tensors[name], "copy") or name not in target:
                _set_parameter(model, name, value)
            else:
                target[name].data = value  # the shared Parameter itself: every name that is tied to it sees the edit
    return model.eval()


def _begins_with(edits: Sequence[Edit], *ops: str) -> bool:
    return bool(edits) and edits[0]["op"] in ops


def _takes_nothing(edits: Sequence[Edit]) -> bool:
    """Whether the edits make a tensor without what it was."""
    return _begins_with(edits, "copy", "new") and "part" not in edits[0]


def place_of(tensor: Tensor) -> int | None:
    """Where a tensor's memory begins; None if it has none that could be shared, as a sparse one."""
    try:
        return tensor.untyped_storage().data_ptr() or None
    except RuntimeError:  # NotImplementedError is one
        return None


class _Replay:
    """The edits of a plan, of tensors in float64.

    Attributes:
        rounds: names, to be done in one round after the other; within one, in any order.
    """

    def __init__(self, source: Mapping[str, Tensor], plan: Mapping[str, Sequence[Edit]], seen: Seen | None) -> None:
        self._source, self._plan, self._seen = source, plan, seen
        self._kept: dict[str, Tensor] = {}
        self._in_place: Set[str] = frozenset()
        self.rounds: tuple[Sequence[str], ...] = (list(plan),)

    def edited(self, name: str) -> tuple[str, Tensor]:
        """The name of a tensor, and what the plan makes of it."""
        edits, old = self._plan[name], self._old(name)
        try:
            own = old if name in self._in_place or _takes_nothing(edits) else in_float64(old)
            value = apply_edits(own, edits, self._lookup, own=True).to(old.device)
        except (RuntimeError, ValueError, IndexError) as error:
            raise InputError(f"the plan does not fit the tensor {name!r}: {error}") from error
        if self._seen is not None:
            self._seen(name, value)
        return name, value

    def _old(self, name: str) -> Tensor:
        if name not in self._source and _begins_with(self._plan[name], "copy", "new"):
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

    def spend(self, others: Iterable[Tensor]) -> None:
        """Edit tensors where they lie, if that can be so that no edit reads what another one has written.

        Args:
            others: tensors whose memory is left as it is.
        """
        places = {name: place_of(tensor) for name, tensor in self._source.items()}
        # What the model does not have is refused when it is looked up.
        reads = {name: {n for row in rows for n in referred(row)} & places.keys() for name, rows in self._plan.items()}
        read = set().union(*reads.values())
        self._kept = {name: self._source[name].clone() for name in read if self._source[name].numel() <= SMALL}
        large = {places[name] for name in read if name not in self._kept}
        # Those that read large tensors are done before any of these is written to.
        first = [name for name, those in reads.items() if any(places[other] in large for other in those)]
        self.rounds = (first, [name for name in self._plan if name not in set(first)])
        # Of memory that several share each may be edited otherwise, or not at all.
        written = [name for name, edits in self._plan.items() if name in places and not _takes_nothing(edits)]
        edited = Counter(places[name] for name in written)
        holders = Counter(place_of(tensor) for tensor in {id(t): t for t in self._source.values()}.values())
        holders.update(place_of(tensor) for tensor in others)
        self._in_place = {
            name
            for name in written
            if places[name] is not None
            and holders[places[name]] == edited[places[name]] == 1
            and (name not in first or places[name] not in large)
            and self._source[name].dtype == torch.float64
            and self._source[name].is_contiguous()
        }


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
