"""The float64 side of a verification: the original beside the edited model, and what each input can be held to.

The edited model is what was loaded from the files, with the weights that the plan makes of the original's in float64
(:mod:`normconvert.verification.stored_weights`), so that one run judges the plan and the files' operations. Where there
are no such files, or their model has no plan, it is the plan applied to a copy of the original.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from normconvert.errors import InputError
from normconvert.plan.conversion_plan import Plan
from normconvert.tracing.model_copy import copy_model
from normconvert.tracing.probes import Probe
from normconvert.verification.algebra import Seen, algebra_model, named_tensors, place_of
from normconvert.verification.divergence import first_divergence
from normconvert.verification.lazy_weights import LazyWeight
from normconvert.verification.moved_exits import kept_exits, movements
from normconvert.verification.moved_weights import WHOLE, moved
from normconvert.verification.probe_runs import Run, Told, default_dtype, inputs_of, prepare, run_model
from normconvert.verification.run_comparison import Distances, compare_runs, rank, without
from normconvert.verification.stored_weights import Stored, with_exact_weights

UNITS = 16.0
"""What moving the weights by one unit of float64 does, times this, may be the distance at an ill-conditioned input."""
WIDEST = 1e-8
"""No tolerance grows beyond this: a model for which it does not suffice is refused."""

Maker = Callable[[], nn.Module]


@dataclass(frozen=True)
class Test:
    """What every model is run on.

    Attributes:
        probes: those that the original runs.
        dtype: of the checkpoints; inputs are rounded to it.
        seed: for models that draw random numbers even in eval mode.
        shifted: outputs whose per-token mean may change.
        tolerance: for the algebra.
        conditioned: it may grow where an input is ill-conditioned.
        left_out: outputs that are not compared.
        told: of each run as it begins.
    """

    probes: tuple[Probe, ...]
    dtype: torch.dtype
    seed: int
    shifted: frozenset[str]
    tolerance: float
    conditioned: bool = True
    left_out: frozenset[str] = frozenset()
    told: Callable[[str], Told | None] = lambda model: None

    def run(self, model: nn.Module, name: str, like: Run | None = None) -> Run:
        """All probes through ``model``, called ``name`` in the progress."""
        run = run_model(model, self.probes, dtype=self.dtype, seed=self.seed, like=like, told=self.told(name))
        return without(run, self.left_out)


@dataclass(frozen=True)
class Proof:
    """The original in float64, and how far the edited model is from it.

    Attributes:
        truth: its outputs.
        distances: of the edited model's outputs; empty if there is none.
        tolerances: (probe, output) -> what the distance is held to, where that is more than usual.
        worst: (probe, output) of the largest distance beside its tolerance.
        worst_module: the first module at which the two part, if they do.
        cannot: probe -> why the edited model could not take it, although the original could.
        stored: how far the files' weights are from the plan's; None if they were not compared.
        moved: way out that the plan lists as shifted -> by how much it moves.
    """

    truth: Run
    distances: Distances = field(default_factory=dict)
    tolerances: Mapping[tuple[str, str], float] = field(default_factory=dict)
    worst: tuple[str, str] | None = None
    worst_module: str | None = None
    cannot: Mapping[str, str] = field(default_factory=dict)
    stored: Stored | None = None
    moved: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Edited:
    """Where the edited model comes from; with no field set there is none.

    Attributes:
        algebra: makes it.
        plan: else: is applied to the original.
        converted: and to this, the files' model as it was loaded, which is used up.
        reload: loads the files in float64, should `converted` remember something of another dtype.
        again: makes the original once more: the plan may be applied to it where it lies, and use it up.
    """

    algebra: Maker | None = None
    plan: Plan | None = None
    converted: nn.Module | None = None
    reload: Maker | None = None
    again: Maker | None = None


def prove(truth: nn.Module, edited: Edited, test: Test) -> Proof:
    """Run the original in float64 and, beside it, the edited model.

    Raises:
        InputError: the original runs on none of the probes, or the plan is another model's.
    """
    exits = edited.plan.shifted_doors if edited.plan is not None else []
    example = inputs_of(test.probes[0], test.dtype, truth)
    with kept_exits(truth, exits, example) as before:
        truth_run = test.run(truth, "the original in float64")
    if not truth_run.outputs:
        reason = next(iter(truth_run.failures.values()))
        raise InputError(f"cannot verify: in float64 the original model runs on none of the probes ({reason})")
    if edited.algebra is None and edited.plan is None:
        return Proof(truth_run)
    original = _Original(truth, edited.again if edited.algebra is None else None)
    if original.spent:
        _keep_apart(truth_run, truth)
    model, stored, algebra = _edited_model(truth, edited)
    del truth
    with kept_exits(model, exits, example) as after:
        run = test.run(model, "the result in float64", truth_run)
    distances = compare_runs(truth_run, run, test.shifted)
    far = run.failures or any(not d.relative <= test.tolerance for d in distances.values())
    if far and stored is not None and edited.reload is not None:
        model = edited.reload()
        # The edited model of before, in no memory of its own: an original that is loaded again may be another one.
        with_exact_weights(model, lambda seen: algebra, None)
        run = test.run(model, "the result in float64, loaded again", truth_run)
        distances = compare_runs(truth_run, run, test.shifted)
    cannot = {name: why for name, why in run.failures.items() if name in truth_run.outputs}
    tolerances = _tolerances(original, truth_run, distances, test) if test.conditioned else {}

    def excess(key: tuple[str, str]) -> float:
        return rank(distances[key].relative / tolerances.get(key, test.tolerance))

    worst = max(distances, key=excess)
    # A model that stops on a probe parts there from the other, and runs no second time.
    far = excess(worst) > 1.0 and worst[0] not in cannot
    module = _where_they_part(original, model, worst[0], truth_run, test) if far else None
    return Proof(truth_run, distances, tolerances, worst, module, cannot, stored, movements(exits, before, after))


def _where_they_part(original: _Original, model: nn.Module, name: str, run: Run, test: Test) -> str | None:
    """The module from which on the two models differ on a probe; ``run`` is the original's."""
    probe, truth = next(p for p in test.probes if p.name == name), original.take()
    if original.spent:  # what is loaded again may be another model, as one that draws random numbers
        before = Run({name: run.outputs[name]}, constants=run.constants)
        now = run_model(truth, [probe], dtype=test.dtype, seed=test.seed, like=before)
        if any(not d.relative <= test.tolerance for d in compare_runs(before, now).values()):
            return None
    with default_dtype(run.constants[name]):
        return first_divergence(truth, model, inputs_of(probe, test.dtype, truth), test.tolerance)


def _keep_apart(run: Run, model: nn.Module) -> None:
    """Give outputs memory of their own: some models return a parameter itself, or a view of one."""
    places = {place_of(tensor) for tensor in named_tensors(model).values()}
    for outputs in run.outputs.values():
        for name, value in outputs.items():
            if place_of(value) in places:
                outputs[name] = value.clone()


class _Original:
    """The original in float64.

    Attributes:
        spent: the edited model takes its memory, and it is loaded again when it is asked for.
    """

    def __init__(self, model: nn.Module, again: Maker | None) -> None:
        self.spent = again is not None
        self._model, self._again = None if self.spent else model, again

    def take(self) -> nn.Module:
        """The model, as it is run."""
        if self._model is None:
            assert self._again is not None
            self._model = self._again()
            prepare(self._model)
        return self._model


def _edited_model(truth: nn.Module, edited: Edited) -> tuple[nn.Module, Stored | None, nn.Module]:
    """The edited model as it is to be run, how far the files' weights are from it, and the plan's own model."""
    if edited.algebra is not None:
        model = edited.algebra()
        return model, None, model
    plan, spend = edited.plan or Plan(""), edited.again is not None
    others = () if edited.converted is None else named_tensors(edited.converted).values()

    def applied(seen: Seen | None) -> nn.Module:
        return algebra_model(truth, plan, share=True, spend=spend, others=others, seen=seen)

    if edited.converted is None:
        model = applied(None)
        return model, None, model
    stored, model = with_exact_weights(edited.converted, applied, truth)
    return edited.converted, stored, model


def _tolerances(original: _Original, run: Run, distances: Distances, test: Test) -> dict[tuple[str, str], float]:
    """(probe, output) -> a wider tolerance, where moving the original's weights by a unit takes it that far itself."""
    off = {key: d.relative for key, d in distances.items() if not d.relative <= test.tolerance}
    if not off or max(map(rank, off.values())) > WIDEST:
        return {}
    truth = original.take()
    if any(isinstance(p, LazyWeight) for p in truth.parameters()):
        return {}
    probes = [probe for probe in test.probes if any(probe.name == name for name, _ in off)]
    if original.spent:  # what is loaded again may be another model: it is held against itself
        run = run_model(truth, probes, dtype=test.dtype, seed=test.seed, like=run)
    reach = dict.fromkeys(off, 0.0)
    for draw in (1, 2):
        with moved(truth, draw, WHOLE):
            other = run_model(truth, probes, dtype=test.dtype, seed=test.seed, like=run)
        for key, d in compare_runs(run, other, test.shifted).items():
            if key in reach:
                reach[key] = max(reach[key], rank(d.relative))
    return {key: min(UNITS * far, WIDEST) for key, far in reach.items() if UNITS * far > test.tolerance}


def able_to_change(model: nn.Module, made_here: bool) -> nn.Module:
    """``model`` itself if it was made for the verification, else a copy."""
    return model if made_here else copy_model(model)
