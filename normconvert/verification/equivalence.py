"""Does the converted model compute what the original computes? Three answers: algebra, rounding, what users feel.

- *Algebra*: the plan applied to float64 copies of the weights, against the original in float64.
- *Rounding*: the stored result in its dtype against that float64 truth, divided by the original's own such error.
- *What users feel*: top-1 agreement, KL divergence, loss difference on text, in the dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from normconvert.errors import InputError
from normconvert.options import taking
from normconvert.plan.conversion_plan import Plan
from normconvert.tracing.probes import Probe, verification_inputs
from normconvert.verification.divergence import first_divergence, watch_means
from normconvert.verification.fidelity import Fidelity
from normconvert.verification.moved_exits import kept_exits, movements
from normconvert.verification.probe_runs import Run, algebra_model, cast, default_dtype, run_model
from normconvert.verification.requests import Verification
from normconvert.verification.run_comparison import (
    Distances,
    compare_runs,
    felt,
    loss_difference,
    rank,
    worst_ratio,
)

if TYPE_CHECKING:
    from normconvert.sources import Source

__all__ = ["Fidelity", "algebra_model", "compare_models", "tolerance_for", "verify", "verify_models"]

TOLERANCE = 1e-10
FLOAT32_TOLERANCE = 1e-5
"""For models that cast a norm's input to float32 whatever their dtype: there float32's rounding is the limit."""
ROUNDING_TOLERANCE = 2.0
STORAGE_UNITS = 32.0
"""Two arbitrary checkpoints may differ by this many units of the coarser storage dtype."""

ModelOrMaker = nn.Module | Callable[[], nn.Module]
"""A model, or a function that makes it when its turn comes, so that few are in memory at once."""


def tolerance_for(plan: Plan | None) -> float:
    """1e-10, or what float32 allows for a model that casts its norms' inputs to float32."""
    return FLOAT32_TOLERANCE if plan is not None and plan.float32_norms else TOLERANCE


def compare_models(
    original: nn.Module,
    converted: nn.Module,
    probes: Sequence[Probe],
    *,
    outputs_shift_allowed: bool = False,
    seed: int = 0,
) -> dict[tuple[str, str], float]:
    """Relative errors of every output of every probe that the original can run, {(probe, output): ||y'-y|| / ||y||}.

    Args:
        original: in float64 for the algebra.
        converted: likewise.
        probes: as :func:`normconvert.tracing.probes.verification_inputs` makes them.
        seed: for models that draw random numbers even in eval mode.
        outputs_shift_allowed: compare all outputs after removing the per-token mean over the channels.
    """
    expected = run_model(original, probes, dtype=torch.float32, seed=seed)
    found = run_model(converted, probes, dtype=torch.float32, seed=seed, like=expected)
    names = {name for outputs in expected.outputs.values() for name in outputs}
    shifted = frozenset(names if outputs_shift_allowed else ())
    return {key: d.relative for key, d in compare_runs(expected, found, shifted).items()}


def _take(model: ModelOrMaker) -> nn.Module:
    return model if isinstance(model, nn.Module) else model()


def verify_models(
    *,
    truth: ModelOrMaker,
    algebra: ModelOrMaker | None,
    original: ModelOrMaker,
    converted: ModelOrMaker,
    probes: Sequence[Probe],
    tolerance: float = TOLERANCE,
    rounding_tolerance: float = ROUNDING_TOLERANCE,
    converted_norms: Sequence[str] = (),
    plan: Plan | None = None,
    seed: int = 0,
) -> Fidelity:
    """The three figures for one conversion.

    Args:
        truth: the original's weights in float64.
        algebra: the plan applied to them in float64; None replays `plan`, or skips this figure (0.0) if that is None.
        original: the original checkpoint in the dtype it is used in.
        converted: the converted one in that dtype.
        probes: as :func:`normconvert.tracing.probes.verification_inputs` makes them.
        tolerance: for the algebra; see :func:`tolerance_for`.
        rounding_tolerance: for the rounding.
        converted_norms: module paths, for ``mean_over_rms``.
        plan: replayed if `algebra` is None; its shifted outputs are compared without their per-token mean.
        seed: for models that draw random numbers even in eval mode.

        Models may be given as functions that make them; then at most two of them are in memory at once.

    Raises:
        InputError: the original runs on none of the probes, or all its outputs are zero or not finite.
    """
    shifted = frozenset(plan.shifted_outputs if plan is not None else ())
    # One model after another, each freed as its function returns: at most two are in memory at once.
    original_run, probes, dtype = _run_original(original, probes, seed)
    test = _Test(tuple(probes), dtype, seed, shifted, tolerance)
    converted_run, mean_over_rms = _run_converted(converted, test, converted_norms, original_run)
    proof = _prove(truth, algebra, plan, test)
    original_errors = compare_runs(proof.truth, original_run, shifted)
    converted_errors = compare_runs(proof.truth, converted_run, shifted)
    _refuse_empty(converted_errors)
    top1, kl = felt(original_run, converted_run)
    fidelity = Fidelity(
        algebra=max((d.relative for d in proof.distances.values()), key=rank, default=0.0),
        rounding=worst_ratio(original_errors, converted_errors, torch.finfo(dtype).eps),
        top1=top1,
        kl=kl,
        loss_difference=loss_difference(probes, original_run, converted_run),
        mean_over_rms=mean_over_rms,
        moved=dict(proof.moved),
        worst_module=proof.worst_module,
        probes=_rows(_skipped(original_run, proof.truth), proof.distances, original_errors, converted_errors),
        tolerance=tolerance,
        rounding_tolerance=rounding_tolerance,
    )
    return judge(fidelity, converted_run, proof.cannot)


@dataclass(frozen=True)
class _Test:
    """What every model is run on.

    Attributes:
        probes: those that the original runs.
        dtype: of the checkpoints; inputs are rounded to it.
        seed: for models that draw random numbers even in eval mode.
        shifted: outputs whose per-token mean may change.
        tolerance: for the algebra.
    """

    probes: tuple[Probe, ...]
    dtype: torch.dtype
    seed: int
    shifted: frozenset[str]
    tolerance: float


@dataclass(frozen=True)
class _Proof:
    """The original in float64, and how far the plan takes it from there.

    Attributes:
        truth: its outputs.
        distances: of the outputs that the plan gives; empty if there is none.
        worst_module: the first module at which the two part, if they do.
        cannot: probe -> why the edited model could not take it, although the original could.
        moved: way out that the plan lists -> by how much it moves.
    """

    truth: Run
    distances: Distances
    worst_module: str | None
    cannot: Mapping[str, str] = field(default_factory=dict)
    moved: Mapping[str, float] = field(default_factory=dict)


def _run_original(original: ModelOrMaker, probes: Sequence[Probe], seed: int) -> tuple[Run, list[Probe], torch.dtype]:
    """The original's outputs, the probes that it runs, and its dtype."""
    model = _take(original)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    run = run_model(model, probes, dtype=dtype, seed=seed)
    able = [probe for probe in probes if probe.name in run.outputs]
    if not able:
        reason = next(iter(run.failures.values()), "there are no probes")
        raise InputError(f"cannot verify: the original model runs on none of the probes ({reason})")
    return run, able, dtype


def _run_converted(
    converted: ModelOrMaker, test: _Test, norms: Sequence[str], original: Run
) -> tuple[Run, float | None]:
    """The converted model's outputs, and the largest |mean|/rms at the input of ``norms``; run as the original was."""
    model = _take(converted)
    with watch_means(model, norms) as means:
        run = run_model(model, test.probes, dtype=test.dtype, seed=test.seed, like=original)
    return run, max(means.values(), default=None)


def _prove(truth: ModelOrMaker, algebra: ModelOrMaker | None, plan: Plan | None, test: _Test) -> _Proof:
    """Run the original in float64 and, beside it, with the plan applied."""
    true_model, exits = _take(truth), plan.shifted_doors if plan is not None else []
    example = _inputs(test.probes[0], test.dtype, true_model)
    with kept_exits(true_model, exits, example) as before:
        truth_run = run_model(true_model, test.probes, dtype=test.dtype, seed=test.seed)
    if not truth_run.outputs:
        reason = next(iter(truth_run.failures.values()))
        raise InputError(f"cannot verify: in float64 the original model runs on none of the probes ({reason})")
    if algebra is None and plan is None:
        return _Proof(truth_run, {}, None)
    edited = _take(algebra) if algebra is not None else algebra_model(true_model, plan or Plan(""))
    with kept_exits(edited, exits, example) as after:
        algebra_run = run_model(edited, test.probes, dtype=test.dtype, seed=test.seed, like=truth_run)
    moved = movements(exits, before, after)
    cannot = {name: why for name, why in algebra_run.failures.items() if name in truth_run.outputs}
    distances = compare_runs(truth_run, algebra_run, test.shifted)
    worst = max(distances, key=lambda key: rank(distances[key].relative))
    # In this direction, so that NaN, which is not within any tolerance, goes on. A model that stops on a probe parts
    # there from the other, and runs no second time.
    if worst[0] in cannot or distances[worst].relative <= test.tolerance:
        return _Proof(truth_run, distances, None, cannot, moved)
    # Here, while both models are in memory: to load them again for the name of a module would take as long once more.
    probe = next(p for p in test.probes if p.name == worst[0])
    inputs = _inputs(probe, test.dtype, true_model)
    with default_dtype(truth_run.constants[probe.name]):
        worst_module = first_divergence(true_model, edited, inputs, test.tolerance)
    return _Proof(truth_run, distances, worst_module, cannot, moved)


def _refuse_empty(errors: Distances) -> None:
    """Refuse outputs that any two models share."""
    if errors and not any(d.size > 0 or d.difference > 0 for d in errors.values()):
        raise InputError(
            "cannot verify: no output of the original holds a finite number other than zero, and on such outputs any "
            "two models agree; are its weights those of a trained model?"
        )


def _skipped(original: Run, truth: Run) -> dict[str, str]:
    """Probe -> why nothing can be said of it."""
    return {**original.failures, **{name: f"in float64: {why}" for name, why in truth.failures.items()}}


def _rows(
    skipped: Mapping[str, str], algebra: Distances, original: Distances, converted: Distances
) -> list[dict[str, Any]]:
    """What the report says of each probe and output."""
    rows: list[dict[str, Any]] = [{"probe": name, "skipped": why} for name, why in skipped.items()]
    return rows + [
        {
            "probe": key[0],
            "output": key[1],
            "algebra": algebra[key].relative if key in algebra else None,
            "original_error": original[key].relative if key in original else None,
            "converted_error": error.relative,
        }
        for key, error in converted.items()
    ]


def _inputs(probe: Probe, dtype: torch.dtype, model: nn.Module) -> dict[str, Any]:
    sample = next(p for p in model.parameters() if p.is_floating_point())
    return {name: cast(value, dtype, sample.dtype, sample.device) for name, value in probe.inputs.items()}


def judge(
    fidelity: Fidelity, converted: Run | None = None, cannot: Mapping[str, str] = MappingProxyType({})
) -> Fidelity:
    """The verdict: one reason for each figure out of its tolerance.

    Args:
        fidelity: the figures.
        converted: the converted model's run; each probe that it could not take is a reason.
        cannot: probe -> why the edited model could not take it in float64, although the original could.
    """
    reasons = [f"in float64 the edited model cannot run probe {probe!r}: {why}" for probe, why in cannot.items()]
    if not fidelity.algebra <= fidelity.tolerance:  # also catches NaN
        at = f", first at {fidelity.worst_module}" if fidelity.worst_module else ""
        reasons.append(f"float64 outputs differ by {fidelity.algebra:.3g} (allowed {fidelity.tolerance:.1g}){at}")
    if fidelity.rounding is not None and not fidelity.rounding <= fidelity.rounding_tolerance:
        allowed = f"(allowed {fidelity.rounding_tolerance:g})"
        reasons.append(f"rounding errors are {fidelity.rounding:.3g} times the original's {allowed}")
    for probe, why in (converted.failures if converted is not None else {}).items():
        reasons.append(f"the converted model cannot run probe {probe!r}, which the original runs: {why}")
    return replace(fidelity, passed=not reasons, reasons=reasons)


@taking(Verification)
def verify(request: Verification) -> Fidelity:
    """Fidelity of checkpoint `b` to checkpoint `a` of the same model.

    If `b` was written by normconvert, its plan is replayed on `a`'s weights in float64: that is held to 1e-10. For
    any other pair the algebra compares `b` with `a` in float64 as they are stored; since storing alone rounds, the
    tolerance there is 32 units (eps) of the coarser storage dtype. With ``max_memory``, in bytes, each weight is read
    when its turn comes, for all probes at once, and freed; otherwise whole models are loaded, two at a time.

    Raises:
        InputError: a checkpoint cannot be read, the two are of different architectures or shapes, or a limit is none.
    """
    a, b, device, max_memory, seed = request.a, request.b, request.device, request.max_memory, request.seed
    from normconvert.sources import open_pair
    from normconvert.verification.limits import check_limits, judge_limits

    limits = check_limits(request.limits or {})
    first, second = open_pair(str(a), str(b), trust_remote_code=request.trust_remote_code)
    # On an original only: replayed on what is converted already, a plan would be applied twice.
    plan = recorded_plan(second.record) if first.record is None else None
    used = request.dtype or second.dtype
    _same_model(first.architecture, second.architecture, str(a), str(b))
    loader = _loader if max_memory is None else partial(_lazy_loader, max_memory=max_memory)
    original = loader(first, used, device)()
    # A plan may change shapes, and says how; without one other shapes are another model.
    if plan is None:
        _same_shapes(original, loader(second, used, device), str(a), str(b))
    algebra = None if plan is not None else loader(second, torch.float64, device)
    if plan is not None and max_memory is not None:
        algebra = _lazy_loader(first, torch.float64, device, plan=plan, max_memory=max_memory)
    # Storing alone rounds: what the coarser of two dtypes cannot hold is no difference between the models.
    coarser = max(torch.finfo(source.dtype).eps for source in (first, second))
    tolerance = tolerance_for(plan) if plan is not None else STORAGE_UNITS * coarser
    fidelity = verify_models(
        truth=loader(first, torch.float64, device),
        algebra=algebra,
        original=original,
        converted=loader(second, used, device),
        probes=verification_inputs(original, seed=seed, tokenizer=first.tokenizer()),
        tolerance=limits.get("algebra", tolerance),
        rounding_tolerance=limits.get("rounding", ROUNDING_TOLERANCE),
        converted_norms=watched_norms(plan) if plan is not None else (),
        plan=plan,
        seed=seed,
    )
    return judge_limits(fidelity, limits)


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
