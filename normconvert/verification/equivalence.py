"""Does the converted model compute what the original computes? Three answers: algebra, rounding, what is seen in use.

- *Algebra*: the files' operations with the plan applied to float64 copies of the weights, against the original in
  float64; and the files' weights against those.
- *Rounding*: the stored result in its dtype against that float64 truth, divided by the original's own such error.
- *In use*: top-1 agreement, KL divergence, loss difference on text, in the dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from normconvert.errors import InputError
from normconvert.options import OF_TENSORS
from normconvert.plan.conversion_plan import Plan
from normconvert.plan.given_rotations import read_rotation
from normconvert.tracing.probes import Probe, verification_inputs
from normconvert.tracing.probes.choose import floating_dtype
from normconvert.verification.divergence import watch_means
from normconvert.verification.fidelity import Fidelity
from normconvert.verification.figures import Errors, finite, probe_rows, remarks_on, skipped_probes
from normconvert.verification.lazy_weights import LazyWeight
from normconvert.verification.probe_runs import Run, Told, in_one_basis, run_model
from normconvert.verification.proof import Edited, Maker, Proof, Test, able_to_change, prove
from normconvert.verification.requests import Verification
from normconvert.verification.rounding import ROUNDING_TOLERANCE, Rounding, measure_rounding
from normconvert.verification.run_comparison import (
    Distances,
    comparable_part,
    compare_runs,
    loss_difference,
    task_metrics,
    without,
)
from normconvert.wording.steps import Step

if TYPE_CHECKING:
    from normconvert.sources import Source

__all__ = ["Fidelity", "tolerance_for", "verify_checkpoints", "verify_models"]

TOLERANCE = 1e-10
FLOAT32_TOLERANCE = 1e-5
"""For models that cast a norm's input to float32 whatever their dtype: there float32's rounding is the limit."""
STORAGE_UNITS = 32.0
"""Two arbitrary checkpoints may differ by this many units of the coarser storage dtype."""

ModelOrMaker = nn.Module | Callable[[], nn.Module]
"""A model, or a function that makes it when its turn comes, so that few are in memory at once."""


def tolerance_for(plan: Plan | None) -> float:
    """1e-10, or what float32 allows for a model that casts its norms' inputs to float32."""
    return FLOAT32_TOLERANCE if plan is not None and plan.float32_norms else TOLERANCE


def verify_models(
    *,
    truth: ModelOrMaker,
    algebra: ModelOrMaker | None,
    original: ModelOrMaker,
    converted: ModelOrMaker,
    probes: Sequence[Probe],
    tolerance: float = TOLERANCE,
    conditioned: bool = True,
    rounding_tolerance: float = ROUNDING_TOLERANCE,
    converted_norms: Sequence[str] = (),
    plan: Plan | None = None,
    wider: ModelOrMaker | None = None,
    exact: Maker | None = None,
    from_files: bool = False,
    level: str = "standard",
    told: Told | None = None,
    seed: int = 0,
) -> Fidelity:
    """The three figures for one conversion.

    Args:
        truth: the original's weights in float64.
        algebra: the plan applied to them in float64; None replays `plan`, or skips this figure (0.0) if that is None.
        original: the original checkpoint in the dtype it is used in.
        converted: the converted one in that dtype. With `plan` and no `algebra`, its weights are compared with the
            plan's, and its operations run in float64.
        probes: as :func:`normconvert.tracing.probes.verification_inputs` makes them.
        tolerance: for the algebra; see :func:`tolerance_for`.
        conditioned: it may grow where moving the original's weights by a unit of float64 changes as much.
        rounding_tolerance: for the rounding.
        converted_norms: module paths, for ``mean_over_rms``.
        plan: replayed if `algebra` is None; its shifted outputs are compared without their per-token mean, or not
            at all where they are in another basis.
        wider: the original in a dtype of larger range, which stands in for `original` where that has no finite outputs.
        exact: loads the converted one in float64, for models that remember the dtype that they were loaded in.
        from_files: `truth` loads what it makes, which is nobody else's: the edited model may take its memory.
        level: ``quick``, ``standard`` or ``thorough``: the last runs all probes in the dtype too.
        told: called with what is done next, before each probe's run.
        seed: for models that draw random numbers even in eval mode.

        Models may be given as functions that make them: then each is freed before the next but one is made.

    Raises:
        InputError: the original runs on none of the probes, or all its outputs are zero or not finite.
    """
    (shifted, left_out), probes = changed_outputs(plan), in_one_basis(probes, plan)
    progress = _Progress(told)
    native = [p for p in probes if p.realistic or level == "thorough"] or list(probes)
    original, original_run, native, dtype = _run_original(original, wider, native, probes, seed, progress, left_out)
    able = [p for p in probes if p.name not in original_run.failures]
    progress.expect(len(native) + 2 * len(able))
    test = Test(tuple(able), dtype, seed, shifted, tolerance, conditioned, left_out, progress.of)
    model, say = _take(converted), progress.of("the result")
    with watch_means(model, converted_norms) as means:
        converted_run = without(run_model(model, native, dtype=dtype, seed=seed, like=original_run, told=say), left_out)
    edited = _edited(model, algebra, plan, exact, truth if from_files else None, made_here=model is not converted)
    del model
    proof = prove(_take(truth), edited, test)
    del edited
    expected = comparable_part(proof.truth, original_run)
    errors = Errors(compare_runs(expected, original_run, shifted), compare_runs(expected, converted_run, shifted))
    _refuse_empty(errors.converted, proof, dtype)
    decides = {p.name for p in native if p.realistic} or {p.name for p in native}
    rounding = measure_rounding(
        *({key: d for key, d in side.items() if key[0] in decides} for side in (errors.converted, errors.original)),
        remake=partial(_take, original), probes=native, expected=expected, dtype=dtype, shifted=shifted,
        tolerance=rounding_tolerance, level=level, seed=seed, casts=plan is not None and plan.float32_norms,
    )  # fmt: skip
    top1, kl = task_metrics(original_run, converted_run)
    fidelity = Fidelity(
        algebra=proof.distances[proof.worst].relative if proof.worst else 0.0,
        rounding=rounding.ratio,
        top1=top1,
        kl=kl,
        loss_difference=loss_difference(native, original_run, converted_run),
        mean_over_rms=max(means.values(), default=None),
        moved=dict(proof.moved),
        worst_module=proof.worst_module,
        probes=probe_rows(skipped_probes(original_run, proof.truth), proof.distances, errors),
        tolerance=proof.tolerances.get(proof.worst, tolerance) if proof.worst else tolerance,
        rounding_tolerance=rounding_tolerance,
        level=level,
        storage=proof.stored.units if proof.stored is not None else None,
        remarks=remarks_on(proof, errors, rounding, dtype if original is wider else None),
    )
    return judge(fidelity, proof, rounding, dtype, converted_run)


def changed_outputs(plan: Plan | None) -> tuple[frozenset[str], frozenset[str]]:
    """The outputs that are compared without their mean, and those in another basis, which cannot be compared at all."""
    names = frozenset(plan.shifted_outputs if plan is not None else ())
    return (frozenset(), names) if plan is not None and plan.method in OF_TENSORS else (names, frozenset())


def _edited(
    model: nn.Module, algebra: ModelOrMaker | None, plan: Plan | None, exact: Maker | None,
    again: ModelOrMaker | None, *, made_here: bool,
) -> Edited:  # fmt: skip
    """Where the edited model comes from: ``model``, as it was loaded from the files, if its weights can be compared."""
    lazy = any(isinstance(p, LazyWeight) for p in model.parameters())
    files = None if algebra is not None or plan is None or lazy else able_to_change(model, made_here)
    made = None if algebra is None else partial(_take, algebra)
    return Edited(made, plan, files, exact, None if isinstance(again, nn.Module) else again)


def _take(model: ModelOrMaker) -> nn.Module:
    return model if isinstance(model, nn.Module) else model()


@dataclass
class _Progress:
    """Counts the runs of probes, for whoever is told."""

    told: Told | None
    done: int = 0
    total: int = 0

    def expect(self, runs: int) -> None:
        """So many more are to come."""
        self.total = self.done + runs

    def of(self, model: str) -> Told | None:
        """What to call with the name of each probe that ``model`` is run on."""
        told = self.told
        if told is None:
            return None

        def one(probe: str) -> None:
            told(Step(f"{model}, probe {probe!r}", self.done, self.total if self.total > self.done else 0))
            self.done += 1

        return one


def _run_original(
    original: ModelOrMaker, wider: ModelOrMaker | None, native: Sequence[Probe], probes: Sequence[Probe], seed: int,
    progress: _Progress, left_out: frozenset[str],
) -> tuple[ModelOrMaker, Run, list[Probe], torch.dtype]:  # fmt: skip
    """The original or what stands in for it, its outputs, the probes that it was run on and can take, its own dtype."""
    model = _take(original)
    dtype = floating_dtype(model)
    run = run_model(model, native, dtype=dtype, seed=seed, told=progress.of("the original"))
    if not run.outputs:  # those that it is not like in use are better than none
        native = probes
        run = run_model(model, native, dtype=dtype, seed=seed)
    able = [probe for probe in native if probe.name in run.outputs]
    if not able:
        reason = next(iter(run.failures.values()), "there are no probes")
        raise InputError(f"cannot verify: the original model runs on none of the probes ({reason})")
    if wider is not None and not finite(run):
        original, run = wider, run_model(_take(wider), able, dtype=dtype, seed=seed)
    return original, without(run, left_out), able, dtype


def _refuse_empty(errors: Distances, proof: Proof, dtype: torch.dtype) -> None:
    """Refuse outputs that any two models share."""
    if not errors or any(d.size > 0 or d.difference > 0 for d in errors.values()):
        return
    if any(d.size > 0 for d in proof.distances.values()):
        raise InputError(
            f"cannot verify: in {str(dtype).removeprefix('torch.')} the original itself gives no finite output; "
            "try --dtype bfloat16 or float32"
        )
    raise InputError(
        "cannot verify: no output of the original holds a finite number other than zero, and on such outputs any "
        "two models agree; are its weights those of a trained model?"
    )


def judge(fidelity: Fidelity, proof: Proof, rounding: Rounding, dtype: torch.dtype, converted: Run) -> Fidelity:
    """The verdict: one reason for each figure out of its tolerance.

    Args:
        fidelity: the figures.
        proof: the float64 side.
        rounding: the dtype's side.
        dtype: of the checkpoints.
        converted: the converted model's run; each probe that it could not take is a reason.
    """
    reasons = [f"in float64 the edited model cannot run probe {probe!r}: {why}" for probe, why in proof.cannot.items()]
    if not fidelity.algebra <= fidelity.tolerance:  # also catches NaN
        at = f", first at {fidelity.worst_module}" if fidelity.worst_module else ""
        where = f" on probe {proof.worst[0]!r}" if proof.worst else ""
        reasons.append(
            f"float64 outputs differ by {fidelity.algebra:.3g} (allowed {fidelity.tolerance:.1g}){where}{at}"
        )
    if proof.stored is not None and not proof.stored.passed:
        reasons.append(
            f"stored weights differ: {proof.stored.tensor} is {proof.stored.units:.3g} units of its dtype from what "
            "the plan makes of the original's (allowed: half a unit); the files are damaged or another conversion's"
        )
    if fidelity.rounding is not None and not fidelity.rounding <= fidelity.rounding_tolerance:
        reasons.append(rounding.reason(fidelity.rounding_tolerance, dtype))
    for probe, why in converted.failures.items():
        reasons.append(f"the converted model cannot run probe {probe!r}, which the original runs: {why}")
    return replace(fidelity, passed=not reasons, reasons=reasons)


def verify_checkpoints(request: Verification) -> Fidelity:
    """:func:`normconvert.verify` of two checkpoints."""
    a, b, device, max_memory, seed = request.a, request.b, request.device, request.max_memory, request.seed
    from normconvert.sources import open_pair
    from normconvert.verification.limits import check_limits, judge_limits

    limits = check_limits(request.limits or {})
    if request.rotation is not None:
        read_rotation(request.rotation)
    first, second = open_pair(str(a), str(b), trust_remote_code=request.trust_remote_code)
    # On what was converted only: replayed on what is the result already, a plan would be applied twice.
    again = first.record is not None and max_memory is None and _is_source_of(second.record, first)
    plan = recorded_plan(second.record) if first.record is None or again else None
    used = request.dtype or second.dtype
    # The library's own RMSNorm model is another class, which the plan names.
    expected = (plan.native if plan is not None else "") or first.architecture
    _same_model(expected, second.architecture, str(a), str(b))
    loader = _loader if max_memory is None else partial(_lazy_loader, max_memory=max_memory)
    # What is converted a second time was traced as its weights need it, and so its plan names modules.
    from_first = _bare_loader if again else loader
    original = from_first(first, used, device)()
    # A plan may change shapes, and says how; without one other shapes are another model.
    if plan is None:
        _same_shapes(original, loader(second, used, device), str(a), str(b))
    algebra = None if plan is not None else loader(second, torch.float64, device)
    if plan is not None and max_memory is not None:
        algebra = _lazy_loader(first, torch.float64, device, plan=plan, max_memory=max_memory)
    coarser = max(torch.finfo(source.dtype).eps for source in (first, second))  # storing alone rounds
    tolerance = tolerance_for(plan) if plan is not None else STORAGE_UNITS * coarser
    fidelity = verify_models(
        truth=from_first(first, torch.float64, device),
        algebra=algebra,
        original=original,
        converted=loader(second, used, device),
        probes=verification_inputs(original, seed=seed, tokenizer=first.tokenizer(), level=request.level),
        tolerance=limits.get("algebra", tolerance),
        conditioned="algebra" not in limits,
        rounding_tolerance=limits.get("rounding", ROUNDING_TOLERANCE),
        converted_norms=watched_norms(plan) if plan is not None else (),
        plan=plan,
        wider=from_first(first, torch.bfloat16, device) if overflow_mended(plan, used) else None,
        exact=loader(second, torch.float64, device) if algebra is None else None,
        from_files=not first.is_pickle,  # whose tensors are read once, for all models
        level=request.level,
        told=request.stage,
        seed=seed,
    )
    return judge_limits(fidelity, limits)


def _is_source_of(record: Mapping[str, Any] | None, source: Source) -> bool:
    """Whether a record says that these very files were converted."""
    recorded = ((record or {}).get("source") or {}).get("sha256")
    return bool(recorded) and recorded == source.hashes()


def overflow_mended(plan: Plan | None, dtype: torch.dtype) -> bool:
    """Whether the original may overflow in ``dtype`` where the converted one is made not to."""
    return plan is not None and plan.method == "scale" and dtype == torch.float16


def watched_norms(plan: Plan) -> list[str]:
    """The norms whose input is to be mean-free as it is."""
    return [edit["path"] for edit in plan.modules if edit["op"] == "replace" and edit["kind"] == "rmsnorm"]


def recorded_plan(record: Mapping[str, Any] | None) -> Plan | None:
    """The plan in the record of a converted folder; None if there is no record.

    Raises:
        InputError: another version wrote it.
    """
    if record is None or not record.get("plan"):
        return None
    try:
        return Plan.from_json(record["plan"])
    except (ValueError, TypeError) as error:
        raise InputError(f"normconvert.json cannot be read: {error}") from error


def _loader(source: Source, dtype: torch.dtype, device: str | torch.device) -> Callable[[], nn.Module]:
    """Makes a checkpoint's model: with the plan's module edits if normconvert wrote it, else as the library does."""
    from normconvert.sources.converted import load_opened

    return partial(load_opened, source, dtype=dtype, device=device)


def _bare_loader(source: Source, dtype: torch.dtype, device: str | torch.device) -> Callable[[], nn.Module]:
    """Makes a checkpoint's model as conversions load it, with those module edits alone that its weights need."""
    return partial(source.load, dtype=dtype, device=device)


def _lazy_loader(
    source: Source, dtype: torch.dtype, device: str | torch.device, *, max_memory: int, plan: Plan | None = None
) -> Callable[[], nn.Module]:
    """As `_loader`, with the weights left in their files; `plan` is applied as :func:`algebra_model` does it."""

    def load() -> nn.Module:
        from normconvert.verification.lazy_models import check_memory, lazy_model

        model = lazy_model(source, dtype, torch.device(device), plan=plan, max_memory=max_memory)
        check_memory(model, max_memory, source.reference)
        return model

    return load


def _same_model(a: str, b: str, path_a: str, path_b: str) -> None:
    if a != b:
        raise InputError(f"expected two checkpoints of one model, found {a} in {path_a} and {b} in {path_b}")


def _same_shapes(original: nn.Module, make: Callable[[], nn.Module], path_a: str, path_b: str) -> None:
    """Raise on the first tensor that only one has, or that has another shape."""
    a, b = ({k: tuple(v.shape) for k, v in m.state_dict().items()} for m in (original, make()))
    for name in dict.fromkeys([*a, *b]):
        if a.get(name) != b.get(name):
            raise InputError(
                f"expected two checkpoints of one model, but {name!r} is {a.get(name, 'missing')} in {path_a} "
                f"and {b.get(name, 'missing')} in {path_b}"
            )
