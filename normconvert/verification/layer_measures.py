"""What a report shows beyond the verdict: the error of every layer, the mean at every norm, perplexity, sizes.

Collected only when a report is asked for, since it runs up to four models once more: the original in float64 (the
truth), the plan replayed on it in float64 (the algebra), and both checkpoints in their dtype.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from normconvert.errors import InputError, first_line
from normconvert.runtime import PostActivation
from normconvert.tracing.output_paths import tensors_in
from normconvert.tracing.probes import Probe, verification_inputs
from normconvert.tracing.probes.choose import floating_dtype
from normconvert.verification.algebra import algebra_model
from normconvert.verification.divergence import (
    Call,
    apart,
    channel_axis,
    comparable,
    mean_over_rms,
    watch_inputs,
    watch_leaves,
)
from normconvert.verification.equivalence import recorded_plan
from normconvert.verification.fidelity import next_token_loss
from normconvert.verification.probe_runs import constant_dtypes, inputs_of, prepare, run_model, run_once

if TYPE_CHECKING:
    from normconvert.plan.conversion_plan import Plan

AGREE = 1e-6
"""Modules closer than this in float64 compute the same; a conversion changes others on purpose, by far more."""
OUTPUT = "output"
"""The name of the last layer: what the model returns."""


@dataclass(frozen=True)
class LayerError:
    """How far a layer's values are from the truth: the largest relative error of any module in it.

    Attributes:
        name: the layer's path, or a module's that stands in no layer.
        algebra: of the plan replayed in float64.
        original: of the original in the stored dtype: the noise that is there anyway.
        converted: of the converted model in that dtype.
    """

    name: str
    algebra: float
    original: float
    converted: float


@dataclass(frozen=True)
class NormInput:
    """What a norm reads, before and after; None where the norm is gone.

    Attributes:
        path: the norm.
        converted: whether the plan changes it.
        before: largest |mean|/rms over the positions, in the original.
        after: in the converted model.
        rms_before: root mean square of the whole input, in the original.
        rms_after: in the converted model.
    """

    path: str
    converted: bool
    before: float
    after: float | None
    rms_before: float
    rms_after: float | None


@dataclass(frozen=True)
class Measures:
    """Everything that :func:`measure` finds.

    Attributes:
        probe: the input that layers and norms were measured on.
        dtype: that the two checkpoints were run in.
        eps: its rounding unit.
        layers: in the order of execution, the model's output last.
        norms: in the order of execution.
        perplexity: ``original``, ``converted`` and ``tokens``, on text; None without a tokenizer.
        parameters: ``original`` and ``converted``.
        bytes: size of the weight files, ``original`` and ``converted``.
        plan: of the conversion, None if B is none.
        architecture: class or model name.
        library: ``transformers`` or ``timm``.
    """

    probe: str
    dtype: str
    eps: float
    layers: list[LayerError]
    norms: list[NormInput]
    perplexity: dict[str, float] | None
    parameters: dict[str, int]
    bytes: dict[str, int]
    plan: Plan | None
    architecture: str
    library: str

    def to_json(self) -> dict[str, Any]:
        """As JSON-ready data, without the plan."""
        return {key: value for key, value in asdict(self).items() if key != "plan"}


@dataclass
class _Records:
    """Outputs of leaf modules in the order of execution, and what norms read."""

    calls: list[Call] = field(default_factory=list)
    values: dict[Call, Tensor] = field(default_factory=dict)
    errors: dict[Call, float] = field(default_factory=dict)


def measure(
    a: str | Path,
    b: str | Path,
    *,
    revision: str | None = None,
    arch: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    seed: int = 0,
) -> Measures:
    """Measure checkpoint ``b`` against ``a``, the original, layer by layer.

    Args:
        a: the original, as :func:`normconvert.convert` takes it.
        b: the converted one, or any other of the same model.
        revision: of ``a`` on the hub.
        arch: of ``a``, if it is bare weights.
        device: where to run.
        dtype: to run both in; None takes that of ``b``'s files.
        trust_remote_code: whether code that comes with a checkpoint may run.
        seed: of the probes.

    Raises:
        InputError: a checkpoint cannot be read, or no probe runs.
    """
    from normconvert.sources import open_source
    from normconvert.sources.converted import load_opened
    from normconvert.sources.opening import recorded_choice

    chosen = recorded_choice(b)
    first = open_source(str(a), revision=revision, arch=arch, trust_remote_code=trust_remote_code, **chosen)
    second = open_source(str(b), trust_remote_code=trust_remote_code)
    plan = recorded_plan(second.record) if first.record is None else None
    used = dtype or second.dtype
    probes = verification_inputs(first.skeleton(), seed=seed, tokenizer=first.tokenizer())
    texts = [probe for probe in probes if probe.name.startswith("text")]

    truth = load_opened(first, dtype=torch.float64, device=device)
    # Text first: what random tokens do to the layers is not what users will see.
    measured, record = _first_that_runs(truth, [*texts, *probes], used)
    edited = algebra_model(truth, plan) if plan is not None else load_opened(second, dtype=torch.float64, device=device)
    algebra = _errors(edited, measured, record)
    del truth, edited

    paths = [verdict.path for verdict in plan.verdicts] if plan is not None else []
    sides, inputs, losses, parameters = [], [], [], {}
    for name, source in (("original", first), ("converted", second)):
        model = load_opened(source, dtype=used, device=device)
        parameters[name] = sum(p.numel() for p in model.parameters())
        with _norm_inputs(model, paths) as read:
            sides.append(_errors(model, measured, record))
        inputs.append(read)
        losses.append(_losses(model, texts, used))
        del model
    return Measures(
        probe=measured.probe.name,
        dtype=str(used).removeprefix("torch."),
        eps=torch.finfo(used).eps,
        layers=_layers(record, algebra, sides[0], sides[1]),
        norms=_norms(plan, inputs[0], inputs[1]),
        perplexity=_perplexity(losses[0], losses[1], texts),
        parameters=parameters,
        bytes={
            name: sum(f.stat().st_size for f in s.files) for name, s in (("original", first), ("converted", second))
        },
        plan=plan,
        architecture=first.architecture,
        library=first.library,
    )


@dataclass(frozen=True)
class _Measured:
    """The call of the model that is looked into.

    Attributes:
        probe: its inputs.
        dtype: floating inputs are rounded to it.
        constants: dtype of the constants that a model in float64 makes.
    """

    probe: Probe
    dtype: torch.dtype
    constants: torch.dtype

    def run(self, model: nn.Module, see: Callable[[Call, Tensor], None]) -> None:
        """Run the model; ``see`` is called with the output of every leaf module, and then with the model's own."""
        prepare(model)
        usual = torch.get_default_dtype()
        constants = self.constants if floating_dtype(model) == torch.float64 else usual
        with watch_leaves(model, see):
            output = run_once(model, inputs_of(self.probe, self.dtype, model), constants)
        for number, value in enumerate(tensors_in(output).values()):
            see((OUTPUT, number), value)


def _first_that_runs(truth: nn.Module, probes: Sequence[Probe], dtype: torch.dtype) -> tuple[_Measured, _Records]:
    """The first probe that the original can run, and everything it computes then."""
    reason = "there are none"
    for probe, constants in itertools.product(probes, constant_dtypes(truth)):
        measured, record = _Measured(probe, dtype, constants), _Records()

        def keep(call: Call, value: Tensor, record: _Records = record) -> None:
            record.calls.append(call)
            record.values[call] = value.to("cpu", copy=True)

        try:
            measured.run(truth, keep)
        except Exception as error:  # a probe that does not fit; the next may
            reason = first_line(error)
        else:
            return measured, record
    raise InputError(f"cannot measure: the original model runs on none of the probes ({reason})")


def _errors(model: nn.Module, measured: _Measured, truth: _Records) -> dict[Call, float]:
    """Relative error of every module's output that the truth has too, in the same shape."""
    errors: dict[Call, float] = {}

    def compare(call: Call, value: Tensor) -> None:
        expected = truth.values.get(call)
        if expected is not None and expected.shape == value.shape:
            errors[call] = apart(expected, value.to("cpu", torch.float64))

    measured.run(model, compare)
    return errors


@contextmanager
def _norm_inputs(model: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, tuple[float, float]]]:
    """While open, collects (largest |mean|/rms, rms) of what every norm reads, at its first call."""
    read: dict[str, tuple[float, float]] = {}

    def see(path: str, module: nn.Module, x: Tensor) -> None:
        if path not in read and x.is_floating_point():
            rms = float(x.detach().double().square().mean().sqrt())
            read[path] = mean_over_rms(x, channel_axis(module, x)), rms

    modules = dict(model.named_modules())
    gone = (PostActivation, nn.Identity, type(None))  # it was fused
    with watch_inputs(model, [path for path in paths if not isinstance(modules.get(path), gone)], see):
        yield read


def _layers(
    record: _Records, algebra: dict[Call, float], original: dict[Call, float], converted: dict[Call, float]
) -> list[LayerError]:
    """The worst of each layer, over the modules that are meant to compute the same as before."""
    calls = [call for call in record.calls if call in algebra and call in original and call in converted]
    # Where the outputs agree, what differs before them does so on purpose: a centred writer is no error.
    outputs_agree = all(algebra[c] <= AGREE for c in calls if c[0] == OUTPUT)
    meant = comparable([(path, algebra[path, n] > AGREE) for path, n in calls], trailing=not outputs_agree)
    layers: dict[str, list[Call]] = {}
    for index, call in enumerate(calls):
        if index in meant or call[0] == OUTPUT:
            layers.setdefault(layer_of(call[0]), []).append(call)
    return [
        LayerError(name, *(max(side[call] for call in members) for side in (algebra, original, converted)))
        for name, members in layers.items()
    ]


def layer_of(path: str) -> str:
    """The layer that a module stands in: its deepest ancestor that is an element of a list; else itself."""
    parts = path.split(".")
    for end in range(len(parts) - 1, 0, -1):
        if parts[end - 1].isdigit():
            return ".".join(parts[:end])
    return path


def _norms(
    plan: Plan | None, before: dict[str, tuple[float, float]], after: dict[str, tuple[float, float]]
) -> list[NormInput]:
    verdicts = {v.path: v.converted for v in plan.verdicts} if plan is not None else {}
    return [
        NormInput(path, verdicts[path], mean, *_of(after.get(path), 0), rms, *_of(after.get(path), 1))
        for path, (mean, rms) in before.items()
    ]


def _of(pair: tuple[float, float] | None, index: int) -> tuple[float | None]:
    return (None,) if pair is None else (pair[index],)


def _losses(model: nn.Module, texts: Sequence[Probe], dtype: torch.dtype) -> list[float | None]:
    run = run_model(model, texts, dtype=dtype)
    return [next_token_loss(run.outputs.get(probe.name, {}), probe.inputs) for probe in texts]


def _perplexity(
    original: list[float | None], converted: list[float | None], texts: Sequence[Probe]
) -> dict[str, float] | None:
    """e to the mean loss over all predicted tokens."""
    counts = [max((v.shape[-1] - 1 for k, v in p.inputs.items() if k.endswith("input_ids")), default=0) for p in texts]
    rows = [(a, b, n) for a, b, n in zip(original, converted, counts, strict=True) if a is not None and b is not None]
    total = sum(n for *_, n in rows)
    if not total:
        return None
    # Beyond e^709 there is no float.
    a, b = (math.exp(min(sum(row[side] * row[2] for row in rows) / total, 700.0)) for side in (0, 1))
    return {"original": a, "converted": b, "tokens": total}
