"""The training norms against their papers in numpy, their gradients, and the affine map that they end as."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from normconvert.tuning.norms import TRAINING_NORMS, FrozenNorm, PowerNorm, RepBatchNorm, UnifiedNorm
from normconvert.tuning.norms.tokens import Moments
from tests.support.norm_references import FrozenReference, PowerReference, RepReference, UnifiedReference

B, T, C, STEPS = 3, 5, 6, 50


@pytest.fixture(autouse=True)
def _double() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def perturbed(norm: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(0.8 + 0.4 * torch.randn(parameter.shape, generator=generator))
    return norm.train()


def batches(steps: int = STEPS, wild: tuple[int, ...] = ()) -> list[tuple[Tensor, Tensor]]:
    """Inputs whose scale drifts and jumps, as a transformer's do, and gradients."""
    generator = torch.Generator().manual_seed(2)
    scale = torch.linspace(0.3, 3.0, C)
    found = []
    for t in range(steps):
        size = 1 + 0.4 * np.sin(t / 3) + (12.0 if t in wild else 0.0)
        x = (torch.randn(B, T, C, generator=generator) + 0.3) * scale * size
        found.append((x, torch.randn(B, T, C, generator=generator)))
    return found


def mask(t: int) -> Tensor:
    """Padding on either side, of another length each time."""
    valid = torch.ones(B, T, dtype=torch.bool)
    valid[0, T - 1 - t % 3 :] = False
    valid[1, : t % 2] = False
    return valid


def numpy(x: Tensor) -> Any:
    return x.detach().double().numpy()


Make = Callable[[], tuple[Any, Any]]


def unified(warmup: int = 8, filtration: bool = True, window: int = 4) -> tuple[Any, Any]:
    norm = perturbed(UnifiedNorm(C, 1e-3, window=window, warmup=warmup, filtration=filtration, ratio_after=20))
    reference = UnifiedReference(numpy(norm.weight), numpy(norm.bias), eps=1e-3, window=window, alpha=0.9,
                                 warmup=warmup, filtration=filtration, ratio_after=20)  # fmt: skip
    return norm, reference


def power(warmup: int = 10) -> tuple[Any, Any]:
    norm = perturbed(PowerNorm(C, 1e-3, warmup=warmup))
    return norm, PowerReference(numpy(norm.weight), numpy(norm.bias), eps=1e-3, alpha=0.9, warmup=warmup)


def repbn() -> tuple[Any, Any]:
    norm = perturbed(RepBatchNorm(C, 1e-3))
    weights = [numpy(p) for p in (norm.weight, norm.bias, norm.old_weight, norm.old_bias)]
    return norm, RepReference(weights[0], weights[1], weights[2], weights[3], norm.eta.item(), eps=1e-3)


def frozen() -> tuple[Any, Any]:
    norm = perturbed(FrozenNorm(C, 1e-3))
    return norm, FrozenReference(numpy(norm.weight), numpy(norm.bias), eps=1e-3, momentum=0.9, positions=T)


CASES: dict[str, Make] = {
    "un": unified,
    "un-without-filtration": lambda: unified(filtration=False),
    "un-without-smoothing": lambda: unified(window=1),
    "powernorm": power,
    "powernorm-without-warmup": lambda: power(0),
    "repbn": repbn,
    "ln-free": frozen,
}


def schedule(norm: Any, reference: Any, t: int) -> None:
    """What the trainer does to a norm as time goes on."""
    if isinstance(norm, RepBatchNorm):
        reference.mix = max(0.0, 1 - t / 40)
        norm.set_mix(reference.mix)
    if isinstance(norm, FrozenNorm) and t == 20:
        norm.freeze()
        reference.frozen = True
    if isinstance(norm, FrozenNorm) and t == 35:
        norm.merge_first()
        reference.apart, reference.first = False, reference.average


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("name", CASES)
def test_fifty_steps_are_those_of_the_paper(name: str, padded: bool) -> None:
    norm, reference = CASES[name]()
    for t, (x, dy) in enumerate(batches(wild=(30,))):
        schedule(norm, reference, t)
        valid = mask(t) if padded else None
        norm.valid = valid
        x = x.requires_grad_()
        norm.zero_grad()
        y = norm(x)
        y.backward(dy)
        flat = numpy(x).reshape(-1, C)
        expected = reference.forward(flat, None if valid is None else valid.reshape(-1).numpy())
        dx, dweight, dbias = reference.backward(numpy(dy).reshape(-1, C))
        assert x.grad is not None
        for label, found, wanted in (
            ("y", numpy(y).reshape(-1, C), expected),
            ("dx", numpy(x.grad).reshape(-1, C), dx),
            ("dweight", numpy(norm.weight.grad), dweight),
            ("dbias", numpy(norm.bias.grad), dbias),
            *((key, numpy(getattr(norm, key)), value) for key, value in reference.state().items()),
        ):
            np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-11, err_msg=f"step {t}: {label}")
        if name == "repbn":
            np.testing.assert_allclose(float(norm.eta.grad), reference.d_eta, rtol=1e-9)


def test_filtration_leaves_the_wild_batch_out() -> None:
    """And without the filtration that batch stays in the window for M batches."""
    results = {}
    for filtration in (True, False):
        norm = perturbed(UnifiedNorm(C, warmup=8, filtration=filtration))
        for x, dy in batches(32, wild=(30,)):
            norm(x.requires_grad_()).backward(dy)
        results[filtration] = norm
    assert int(results[True].skipped) >= 1
    assert int(results[False].skipped) == 0
    assert results[False].window_x2.amax() > 5 * results[True].window_x2.amax()


def test_an_outlier_leaves_a_damped_trace_in_the_running_variance() -> None:
    """Not its own variance, which would spoil inference; but it is no stranger if it comes again and again."""
    norm = perturbed(UnifiedNorm(C, warmup=8))
    for x, _ in batches(29):
        norm(x)
    before, skipped = norm.running_var.clone(), int(norm.skipped)
    wild = 10 * batches(30)[-1][0]
    norm(wild)
    assert int(norm.skipped) == skipped + 1
    own = wild.square().mean((0, 1))
    assert (norm.running_var < before + 0.04 * own).all()
    for _ in range(100):
        norm(wild)
    torch.testing.assert_close(norm.running_var, own, rtol=0.1, atol=0)


EXACT: dict[str, Callable[[], Any]] = {
    "un, window 1": lambda: UnifiedNorm(C, 1e-3, window=1),
    "powernorm, nothing moves": lambda: PowerNorm(C, 1e-3, forward_momentum=1.0, backward_momentum=1.0, warmup=0),
    "repbn, both parts": lambda: RepBatchNorm(C, 1e-3),
    "repbn, RMSNorm before": lambda: RepBatchNorm(C, 1e-3, centred=False),
    "ln-free, before": lambda: FrozenNorm(C, 1e-3),
}


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("name", EXACT)
def test_gradients_are_exact_where_nothing_is_estimated(name: str, padded: bool) -> None:
    norm = perturbed(EXACT[name]())
    norm.valid = mask(4) if padded else None
    if isinstance(norm, RepBatchNorm):
        norm.set_mix(0.3)
    parameters = {k: v.detach().clone().requires_grad_() for k, v in norm.named_parameters()}

    def f(x: Tensor, *values: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(norm, dict(zip(parameters, values, strict=True)), (x,))
        return result

    x = batches(1)[0][0].requires_grad_()
    assert torch.autograd.gradcheck(f, (x, *parameters.values()))


def images(axis: int) -> Tensor:
    return torch.randn(2, C, 3, 4) if axis == -3 else torch.randn(2, 3, 4, C)


@pytest.mark.parametrize("axis", [-1, -3])
@pytest.mark.parametrize("method", TRAINING_NORMS)
def test_eval_mode_is_one_affine_map_per_channel(method: str, axis: int) -> None:
    norm = perturbed(TRAINING_NORMS[method](C, 1e-3, axis=axis))
    for _ in range(5):
        norm(images(axis))
    if isinstance(norm, RepBatchNorm):
        norm.set_mix(0)
    if isinstance(norm, FrozenNorm):
        norm.freeze()
        norm.merge_first()
    x = images(axis)
    a, b = norm.affine()
    expected = (x.movedim(axis, -1) * a + b).movedim(-1, axis)
    torch.testing.assert_close(norm.eval()(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", TRAINING_NORMS)
def test_calibrated_norms_are_close_to_the_norm_replaced(method: str) -> None:
    old = perturbed(nn.LayerNorm(64, 1e-3))
    x = torch.randn(40, 30, 64) * torch.linspace(0.5, 2, 64) + torch.linspace(-1, 1, 64).flip(0).square()
    x = x - x.mean(-1, keepdim=True)
    y = old(x)
    rows, made = x.reshape(-1, 64), y.detach().reshape(-1, 64)
    sigma = (x.square().mean(-1) + 1e-3).sqrt()
    moments = Moments(
        n=1200, x=rows.sum(0), y=made.sum(0), xx=(rows * rows).sum(0), xy=(rows * made).sum(0),
        yy=(made * made).sum(0), deviation=float(sigma[:, 1:].sum()), first=float(sigma[:, 0].sum()), n_rest=1160,
        n_first=40,
    )  # fmt: skip
    norm = TRAINING_NORMS[method](64, 1e-3)
    with torch.no_grad():
        norm.weight.copy_(old.weight)
        norm.bias.copy_(old.bias)
    norm.calibrate(moments)
    if isinstance(norm, RepBatchNorm):
        norm.set_mix(0)
    if isinstance(norm, FrozenNorm):
        norm.freeze()
        norm.merge_first()
    error = (norm.eval()(x) - y).norm() / y.norm()
    assert error < 0.15
    a, b = norm.affine()
    torch.testing.assert_close(norm(x), x * a + b)


def test_group_scaling_is_no_affine_map_and_differentiable() -> None:
    norm = perturbed(PowerNorm(C, 1e-3, groups=2, forward_momentum=1.0, backward_momentum=1.0, warmup=0))
    x = batches(1)[0][0].requires_grad_()
    assert torch.autograd.gradcheck(norm, (x,))
    norm.eval()
    parts = x.detach().reshape(B, T, 2, 3)
    scaled = (parts / (parts.square().mean(-1, keepdim=True) + 1e-3).sqrt()).reshape(B, T, C)
    a, b = norm.affine()
    torch.testing.assert_close(norm(x), scaled * a + b)
    with pytest.raises(ValueError, match="do not divide"):
        PowerNorm(C, groups=4)


def test_sixteen_bit_inputs_are_measured_in_float32() -> None:
    for method, make in TRAINING_NORMS.items():
        norm = make(C).float()
        x = (torch.randn(B, T, C) * 300).to(torch.float16)
        y = norm(x)
        assert y.dtype == torch.float16, method
        assert torch.isfinite(y).all(), method  # 300² is beyond float16


def test_the_spread_of_sigma_pulls_tokens_to_one_length() -> None:
    norm = FrozenNorm(C).train()
    norm.keep_spread = True
    x = batches(1)[0][0].requires_grad_()
    losses = []
    for _ in range(30):
        norm(x)
        assert norm.spread is not None
        (grad,) = torch.autograd.grad(norm.spread, x)
        losses.append(float(norm.spread))
        x = (x - 5 * grad).detach().requires_grad_()
    assert losses[-1] < 0.1 * losses[0]
