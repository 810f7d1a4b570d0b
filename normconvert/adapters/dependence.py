"""Which edits of a plan read what an adapter changes: tensors that would have to change with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from normconvert.adapters.adapter_files import Adapter, LowRank
from normconvert.adapters.low_rank import adapted, delta, layout_of
from normconvert.errors import InputError
from normconvert.plan.conversion_plan import Plan
from normconvert.plan.edits import Lookup
from normconvert.plan.vectors import names_in
from normconvert.verification.algebra import named_tensors


def module_of(name: str) -> str:
    """The module that a tensor belongs to."""
    return name.rpartition(".")[0]


@dataclass(frozen=True)
class Original:
    """The original in float64, and what an adapter changes of it.

    An adapter changes modules: a weight that two modules share is another one in each afterwards. So the same tensor
    may have a different value for each tensor that is made of it, which is called its *reader* here.

    Attributes:
        model: the original.
        adapter: of it.
        tensors: its parameters and buffers, tied ones under each of their names.
        groups: name -> all names of the same tensor.
    """

    model: nn.Module
    adapter: Adapter
    tensors: dict[str, Tensor]
    groups: dict[str, tuple[str, ...]] = field(repr=False)

    @classmethod
    def of(cls, model: nn.Module, adapter: Adapter) -> Original:
        """Of a model in float64."""
        tensors = named_tensors(model)
        same: dict[int, list[str]] = {}
        for name, tensor in tensors.items():
            same.setdefault(id(tensor), []).append(name)
        return cls(model, adapter, tensors, {n: tuple(names) for names in same.values() for n in names})

    def source(self, name: str) -> Tensor:
        """A tensor without the adapter.

        Raises:
            InputError: the model has none of that name.
        """
        if name not in self.tensors:
            raise InputError(f"{name!r} is no tensor of {type(self.model).__name__}: is --for or --source another's?")
        return self.tensors[name]

    def named_for(self, name: str, reader: str) -> str:
        """The name under which ``reader`` reads a tensor: that of its own module, where it is tied to others."""
        own = (other for other in self.groups.get(name, ()) if module_of(other) == module_of(reader))
        return next(own, name)

    def change(self, name: str) -> LowRank | None:
        """What LoRA adds to the tensor of that name, if anything."""
        path, _, leaf = name.rpartition(".")
        return self.adapter.low_rank.get(path) if leaf == "weight" else None

    def is_changed(self, name: str) -> bool:
        """Whether the adapter gives the tensor another value."""
        return name in self.adapter.saved or self.change(name) is not None

    def changed_reads(self, row: Mapping[str, Any], reader: str) -> set[str]:
        """What the adapter changes among the tensors that an edit of ``reader`` reads."""
        read = set(names_in(row["by"])) if "by" in row else set()
        read |= {str(row["weight"])} if "weight" in row else set()
        return {name for name in (self.named_for(one, reader) for one in read) if self.is_changed(name)}

    def with_adapter(self, reader: str) -> Lookup:
        """Tensors with the adapter, as an edit of ``reader`` reads them."""

        def lookup(name: str) -> Tensor:
            own = self.named_for(name, reader)
            if own in self.adapter.saved:
                return self.adapter.saved[own].double()
            change, weight = self.change(own), self.source(own)
            if change is None:
                return weight
            return adapted(change, layout_of(self.model.get_submodule(change.path), change, weight), weight)

        return lookup

    def product(self, reader: str) -> Lookup:
        """What LoRA adds, unscaled, in the layout of the tensor; zeros where it adds nothing."""

        def lookup(name: str) -> Tensor:
            own = self.named_for(name, reader)
            change, weight = self.change(own), self.source(own)
            if change is None:
                return torch.zeros_like(weight)
            return delta(change, layout_of(self.model.get_submodule(change.path), change, weight), weight.shape)

        return lookup


def edits_of(plan: Plan, name: str) -> Sequence[dict[str, Any]]:
    """The edits of a tensor, under whichever of its names the plan has them; a copy is the same tensor before."""
    if name in plan.tensors:
        found = plan.tensors[name]
    else:
        found = next((plan.tensors[key] for key, names in plan.aliases.items() if name in names), [])
    return [row for row in found if row["op"] != "copy"]


def check_dependents(original: Original, plan: Plan, settled: set[str]) -> None:
    """Refuse an adapter if a tensor that it cannot change would have to change.

    Args:
        original: with the adapter.
        plan: of the conversion.
        settled: names of tensors that the converted adapter changes accordingly.

    Raises:
        InputError: there is one; the message names it, and what it is made of.
    """
    for key in plan.tensors:
        for name in plan.aliases.get(key, [key]):
            if name in settled:
                continue
            changed = sorted({n for row in edits_of(plan, name) for n in original.changed_reads(row, name)})
            if changed:
                raise InputError(
                    f"the conversion makes {name} of {changed[0]}, which the adapter changes, and the adapter has no "
                    f"place for another {name}: merge the adapter into the original and convert that"
                )
