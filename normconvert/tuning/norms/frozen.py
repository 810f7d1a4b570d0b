"""No norm at all: LayerNorm with a frozen divisor (arXiv 2507.02559; the authors' code: submarat/removing-layer-norm).

    before   y = γ∘Px / σ(x) + β,   σ(x) = √(|Px|²/d + ε),   P = I - 11'/d
    after    y = γ∘x / σ̄ + β,       σ̄ the average of σ(x) over tokens when the norm was frozen

Norms are frozen one after another, with training in between. In language models the first position has a σ that is far
from that of all others, so it keeps an average of its own, until that, too, is replaced by σ̄ (the paper's last step).

Freezing drops P, as in the authors' code. Where the stream has been centred (see :mod:`normconvert.rewrites.rmsnorm`)
and is kept so, P is the identity and nothing is lost by that; elsewhere the model has to learn it. An RMSNorm has x in
place of Px from the start (``centred=False``), and gains β.

The auxiliary loss of the paper (section 3.3) is :attr:`FrozenNorm.spread`, mean (σ(x) - mean σ)²: it makes all tokens
have one σ before it is frozen.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from normconvert.tuning.norms.tokens import Moments, along, rows, summed, unrows, weights_of


class FrozenNorm(nn.Module):
    """See the module's text.

    Args:
        size: number of channels.
        eps: added to the variance.
        axis: of the channels in the input.
        momentum: of the averages of σ over batches; 0: the last batch's (the authors' code).
        centred: subtract the token's mean (LayerNorm); False where the norm replaced is an RMSNorm.
    """

    average: Tensor
    first: Tensor
    frozen: Tensor
    apart: Tensor

    def __init__(
        self, size: int, eps: float = 1e-5, *, axis: int = -1, momentum: float = 0.9, centred: bool = True
    ) -> None:
        super().__init__()
        self.size, self.eps, self.axis, self.momentum, self.centred = size, eps, axis, momentum, centred
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))
        self.register_buffer("average", torch.ones(()))
        self.register_buffer("first", torch.ones(()))
        self.register_buffer("frozen", torch.zeros((), dtype=torch.bool))
        self.register_buffer("apart", torch.ones((), dtype=torch.bool))
        self.valid: Tensor | None = None
        self.keep_spread = False
        self.spread: Tensor | None = None

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"{self.size}, eps={self.eps}, frozen={bool(self.frozen)}"

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``input``, any shape with ``size`` channels at ``axis``; same shape and dtype out."""
        axis = self.axis
        if self.frozen and not self.apart and not self.training:
            return input * along(self.weight / self.average, input, axis).to(input.dtype) + along(
                self.bias, input, axis
            ).to(input.dtype)
        x = rows(input, axis)
        is_first = first_tokens(input, axis, self.valid)
        if not self.frozen or (self.training and self.keep_spread):
            centred = x - x.mean(-1, keepdim=True) if self.centred else x
            sigma = (centred.square().mean(-1, keepdim=True) + self.eps).sqrt()
            if self.training:
                self._observe(sigma, weights_of(self.valid, input, axis), is_first)
        if not self.frozen:
            return unrows(centred / sigma * self.weight + self.bias, input, axis)
        if bool(self.apart) and is_first is not None:
            divisor = torch.where(is_first, self.first, self.average).to(x.dtype)
        else:
            divisor = self.average.to(x.dtype)
        return unrows(x / divisor * self.weight + self.bias, input, axis)

    def _observe(self, sigma: Tensor, weight: Tensor | None, is_first: Tensor | None) -> None:
        """Note a batch's σ, (tokens, 1): the averages, and the spread if it is wanted."""
        ones = torch.ones_like(sigma) if weight is None else weight
        rest = ones if is_first is None else ones * ~is_first
        groups = [(rest, self.average)] if is_first is None else [(rest, self.average), (ones * is_first, self.first)]
        with torch.no_grad():
            for chosen, average in groups if not self.frozen else ():
                n = summed(chosen.sum())
                found = summed((sigma * chosen).sum()) / n.clamp_min(1)
                moved = self.momentum * average + (1 - self.momentum) * found
                # A batch in which no such token counts (all are padded) has no σ, and must not pull the average to
                # zero.
                average.copy_(torch.where(n > 0, moved, average))
        if self.keep_spread:
            # Without a gradient through the target: tokens move towards it, it does not move towards them.
            target = self.average if self.frozen else (sigma.detach() * rest).sum() / rest.sum().clamp_min(1)
            self.spread = ((sigma - target.to(sigma.dtype)).square() * rest).sum() / rest.sum().clamp_min(1)

    def freeze(self) -> None:
        """Divide by the averages from now on."""
        self.frozen.fill_(True)

    def merge_first(self) -> None:
        """Treat the first position as all others from now on."""
        self.apart.fill_(False)
        self.first.copy_(self.average)

    def calibrate(self, moments: Moments) -> None:
        """Start from the averages of σ over calibration data."""
        with torch.no_grad():
            if moments.n_rest:
                self.average.fill_(moments.deviation / moments.n_rest)
            if moments.n_first:
                self.first.fill_(moments.first / moments.n_first)
            if not moments.n_rest:
                self.average.copy_(self.first)

    def affine(self) -> tuple[Tensor, Tensor]:
        """(a, b) in float64: once frozen this norm is a∘x + b in eval mode."""
        return self.weight.detach().double() / self.average.detach().double(), self.bias.detach().double()


def first_tokens(input: Tensor, axis: int, valid: Tensor | None = None) -> Tensor | None:
    """Which tokens stand at the first position of a sequence, as (tokens, 1); None if the input has no positions.

    A sequence is an input (batch, positions, channels). Padding before it is not of it. Of four dimensions one more is
    heads, or the two are of an image: nothing there is known to be a first position.
    """
    if input.ndim != 3 or axis not in (-1, 2) or input.shape[-2] < 2:
        return None
    shape = input.shape[:-1]
    if valid is not None and valid.shape == shape:
        valid = valid.to(input.device)
        return (valid & (valid.cumsum(-1) == 1)).reshape(-1, 1)
    found = torch.zeros(shape, dtype=torch.bool, device=input.device)
    found[..., 0] = True
    return found.reshape(-1, 1)
