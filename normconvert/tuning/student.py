"""The two models of a swap: the teacher, which is the original, and the student, whose norms are the training norms.

Both are the original with the ``rmsnorm`` plan's centring applied, which changes nothing that they compute. From then
on the student is kept centred: after each optimiser step the writers' means, which no LayerNorm can see, are taken out
again. So the norms that end as a∘x + b read mean-free values, and LayerNorm's subtraction of the mean, which no such
map can express, is nowhere needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from normconvert.plan.conversion_plan import Plan
from normconvert.plan.edits import apply_edits
from normconvert.runtime.modules import stand_in
from normconvert.tracing.model_copy import copy_model
from normconvert.tuning.attention import BlendedAttention
from normconvert.tuning.norms import TRAINING_NORMS, FrozenNorm, RepBatchNorm, SwapNorm
from normconvert.tuning.norms.frozen import first_tokens
from normconvert.tuning.norms.tokens import Moments, rows, summed, weights_of
from normconvert.tuning.sites import NormSite
from normconvert.verification.algebra import algebra_model, named_tensors

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Student:
    """A model whose norms are being swapped.

    Attributes:
        model: in train mode where its training norms are concerned, in eval mode otherwise (no dropout).
        norms: path -> the training norm there, in execution order.
        sites: what they replace.
        writers: name -> the edits that centre it.
        attentions: path of a module -> the attention that fades into a linear one there.
    """

    model: nn.Module
    norms: dict[str, SwapNorm]
    sites: tuple[NormSite, ...]
    writers: dict[str, list[dict[str, Any]]]
    attentions: dict[str, BlendedAttention] = field(default_factory=dict)

    def project(self) -> None:
        """Take the means out of what writes into centred streams."""
        tensors = named_tensors(self.model)
        with torch.no_grad():
            for name, edits in self.writers.items():
                value = tensors[name]
                value.copy_(apply_edits(value, edits, tensors.__getitem__).to(value.dtype))

    def train(self, mode: bool = True) -> None:
        """Let the training norms and attention measure, or let them be what they end as."""
        # First, for all modules: dropout would be noise in what is compared with the teacher.
        self.model.eval()
        for part in (*self.norms.values(), *self.attentions.values()):
            part.train(mode)

    @contextmanager
    def masked(self, batch: Batch) -> Iterator[None]:
        """Tell the norms which tokens of a batch are padding."""
        mask = batch.get("attention_mask")
        for norm in self.norms.values():
            norm.valid = None if mask is None or mask.ndim != 2 else mask.bool()
        try:
            yield
        finally:
            for norm in self.norms.values():
                norm.valid = None


def call(model: nn.Module, batch: Batch) -> Any:
    """The model's output for a batch, whose labels it does not see."""
    return model(**{name: value for name, value in batch.items() if name != "labels"})


def move(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """A batch on the device."""
    return {name: value.to(device) for name, value in batch.items()}


def make_teacher(original: nn.Module, plan: Plan, dtype: torch.dtype) -> nn.Module:
    """The original with the plan's centring, and its own norms.

    Args:
        original: in float64; not changed.
        plan: of the ``rmsnorm`` rewrite.
        dtype: of the result.
    """
    centred = replace(plan, modules=[edit for edit in plan.modules if edit["op"] != "replace"])
    teacher = algebra_model(original, centred).to(dtype).eval()
    return teacher.requires_grad_(False)


def make_student(
    teacher: nn.Module, plan: Plan, sites: Sequence[NormSite], method: str, options: Mapping[str, Any] | None = None
) -> Student:
    """A copy of the teacher with training norms at ``sites``, which start with the parameters of the norms there.

    Args:
        teacher: see :func:`make_teacher`.
        plan: the same.
        sites: the norms to swap.
        method: a row of :data:`normconvert.tuning.norms.TRAINING_NORMS`.
        options: further arguments of the training norm.
    """
    model = copy_model(teacher)
    norms: dict[str, SwapNorm] = {}
    for site in sites:
        old = model.get_submodule(site.path)
        more = {"centred": site.centred} if method in ("repbn", "ln-free") else {}
        norm = TRAINING_NORMS[method](site.size, site.eps, axis=site.axis, **more, **(options or {}))
        weight = getattr(old, site.weight) + site.offset if site.weight else torch.ones(site.size)
        bias = getattr(old, site.bias) if site.bias else torch.zeros(site.size)
        with torch.no_grad():
            norm.weight.copy_(weight.reshape(-1))
            norm.bias.copy_(bias.reshape(-1))
            if isinstance(norm, RepBatchNorm):
                norm.old_weight.copy_(norm.weight)
                norm.old_bias.copy_(norm.bias)
        stand_in(model, old, norm.to(next(model.parameters()).device))
        norms[site.path] = norm
    centred = {
        name: [edit for edit in edits if edit["op"] == "center"]
        for name, edits in plan.tensors.items()
        if any(edit["op"] == "center" for edit in edits)
    }
    tensors = named_tensors(model)
    for name, tensor in tensors.items():
        if isinstance(tensor, nn.Parameter):
            # A layer scale that was folded into its writer is ones: trained, it would take the stream off its centre
            # again.
            fixed = any(edit["op"] == "fill" for edit in plan.tensors.get(name, ()))
            tensor.requires_grad_(tensor.is_floating_point() and not fixed)
    student = Student(model, norms, tuple(sites), centred)
    student.train()
    return student


def measure(teacher: nn.Module, sites: Sequence[NormSite], batches: Iterator[Batch]) -> dict[str, Moments]:
    """One pass over ``batches``: what the norms at ``sites`` read and make, over all processes.

    Args:
        teacher: with its own norms.
        sites: the norms to measure.
        batches: inputs.

    Returns:
        Path -> sums over tokens.
    """
    found: dict[str, Moments] = {}
    mask: list[Tensor | None] = [None]
    hooks = [
        teacher.get_submodule(site.path).register_forward_hook(_Measure(site, found, mask), with_kwargs=True)
        for site in sites
    ]
    try:
        with torch.no_grad():
            for batch in batches:
                attention = batch.get("attention_mask")
                mask[0] = attention.bool() if attention is not None and attention.ndim == 2 else None
                call(teacher, batch)
    finally:
        for hook in hooks:
            hook.remove()
    for site in sites:
        if site.path in found:
            _sum_over_processes(found[site.path])
    return found


class _Measure:
    """A forward hook that adds a norm's input and output to its moments."""

    def __init__(self, site: NormSite, found: dict[str, Moments], mask: list[Tensor | None]) -> None:
        self.site, self.found, self.mask = site, found, mask

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        input = args[0] if args else next(iter(kwargs.values()))
        axis = self.site.axis
        # Sums over all tokens, and a variance that is the difference of two: float32 would leave little of it.
        x, y = rows(input, axis).double(), rows(output, axis).double()
        weight = weights_of(self.mask[0], input, axis)
        weight = x.new_ones(x.shape[0], 1) if weight is None else weight.double()
        beginning = first_tokens(input, axis, self.mask[0])
        first = torch.zeros_like(weight) if beginning is None else weight * beginning
        square = x.var(-1, unbiased=False, keepdim=True) if self.site.centred else x.square().mean(-1, keepdim=True)
        sigma = (square + self.site.eps).sqrt()
        new = Moments(
            n=float(weight.sum()),
            x=(x * weight).sum(0),
            y=(y * weight).sum(0),
            xx=(x * x * weight).sum(0),
            xy=(x * y * weight).sum(0),
            yy=(y * y * weight).sum(0),
            deviation=float((sigma * (weight - first)).sum()),
            first=float((sigma * first).sum()),
            n_rest=float((weight - first).sum()),
            n_first=float(first.sum()),
        )
        old = self.found.get(self.site.path)
        values = {k: getattr(old, k) + v for k, v in vars(new).items()} if old is not None else vars(new)
        self.found[self.site.path] = Moments(**values)


def _sum_over_processes(moments: Moments) -> None:
    numbers = ("n", "deviation", "first", "n_rest", "n_first")
    totals = summed(moments.x.new_tensor([getattr(moments, k) for k in numbers]))
    for key, total in zip(numbers, totals.tolist(), strict=True):
        setattr(moments, key, total)
    for key in ("x", "y", "xx", "xy", "yy"):
        setattr(moments, key, summed(getattr(moments, key)))


def finish(student: Student) -> None:
    """Make every norm what it ends as: nothing of the old one is left."""
    for norm in student.norms.values():
        if isinstance(norm, RepBatchNorm):
            norm.set_mix(0.0)
        if isinstance(norm, FrozenNorm):
            norm.freeze()
            norm.merge_first()
            norm.keep_spread = False
    for attention in student.attentions.values():
        attention.set_mix(0.0)
    student.project()
    student.train(False)
