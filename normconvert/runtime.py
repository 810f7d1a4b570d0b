"""RMSNorm, and the loader that puts it in place: what a converted checkpoint needs to run.

This file is shipped verbatim inside transformers outputs as ``modeling_normconvert.py``. It therefore imports torch,
lazily transformers, and no other file of the package. Any architecture works without code of its own, since a converted
class is made on demand from the class that ``config.json`` names::

    AutoModelForCausalLM.from_pretrained(OUT, trust_remote_code=True)

asks this module for, say, ``GPT2LMHeadModel``; the module's ``__getattr__`` answers with a subclass of the library's
class of that name whose constructor applies the module edits found in the config. The subclass keeps the name, so that
whatever looks at class names (pipelines, weight renaming, ``architectures`` in a saved config) sees the architecture.

An edit is plain data, a row with ``op`` naming a function of :data:`MODULE_EDITS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

CONFIG_KEY = "normconvert"
"""The key of config.json that holds ``{"format", "architecture", "modules"}``."""
REMOTE_FILE = "modeling_normconvert.py"
"""The name of this file inside an output."""

BARE_FROM = 200_000
"""CPU, mean-free input, no parameters or folded ones: numbers in the input for each thread from which on the definition
without parameters beats fused LayerNorm, and it pays to look whether folded ones still are ones and zeros. Measured by
tools/benchmarks/norm.py, as is every choice of a kernel here."""
IN_PLACE_FROM = {False: 25_000, True: 500_000}
"""CPU, no promise of a mean-free input: numbers from which on few passes count for more than few operations; the key
says whether there is a weight or bias to apply."""
MEAN_LIMIT = 1e-2
"""Largest |mean|/rms of an input that still counts as mean-free (16-bit weights leave about 1e-3)."""
MEAN_CHECK_EVERY = 256
"""Calls between two looks at the mean of the input."""

_FUSED_RMS = ("cuda", "xpu", "mps")
"""Devices whose ``F.rms_norm`` is one kernel in eager mode; elsewhere it is a chain of small ones."""


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * (weight + offset) + bias, the mean taken over one axis.

    The sum of squares is accumulated in float32 for 16-bit inputs, in the input's dtype otherwise; the result has the
    input's dtype and is rounded to it once. This covers norms that cast to float32 by themselves.

    Args:
        size: length of the normalised axis.
        eps: added to the mean square.
        axis: the normalised axis of the input; -1 for (..., size), -3 for images (batch, size, height, width).
        offset: added to the weight (1.0 where the checkpoint stores weight - 1).
        weight: shape (size,), or for axis -1 any shape that broadcasts against the input's last axes; None: ones.
        bias: like ``weight``; None: zeros.
        weight_name: name the weight is registered under.
        bias_name: name the bias is registered under.
        mean_free: the caller has proved that inputs have mean zero along the axis. RMSNorm and LayerNorm are then the
            same function, and a fused LayerNorm kernel is used where it is the faster one. The proof is about the
            converted weights: ``train()`` ends it, and so does an input seen with another mean (adapters, say).
        folded: the weight is all ones and the bias all zeros, if nobody has changed them since the conversion. They are
            looked at before they are left out.
        channels_last: for another axis than the last: in memory the result has that axis innermost, whatever the input,
            as that of a norm that permutes, calls layer_norm and permutes back.
    """

    def __init__(
        self,
        size: int,
        eps: float = 1e-5,
        *,
        axis: int = -1,
        offset: float = 0.0,
        weight: nn.Parameter | None = None,
        bias: nn.Parameter | None = None,
        weight_name: str = "weight",
        bias_name: str = "bias",
        mean_free: bool = False,
        folded: bool = False,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self.normalized_shape = (size,)
        self.eps = self.variance_epsilon = eps
        self.axis, self.offset, self.channels_last = axis, offset, channels_last
        self.mean_free, self.folded = mean_free, folded
        self._until_look = [0]  # a list: to set an attribute of a module takes as long as a small norm
        self.weight_name, self.bias_name = weight_name, bias_name
        self.register_parameter(weight_name, weight)
        self.register_parameter(bias_name, bias)
        self.elementwise_affine = weight is not None

    def train(self, mode: bool = True) -> RMSNorm:
        """Set the mode; training ends ``mean_free``, since it moves the weights the proof was about."""
        self.mean_free = self.mean_free and not mode
        return super().train(mode)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        shown = [str(self.normalized_shape[0]), f"eps={self.eps}"]
        shown += [f"axis={self.axis}"] if self.axis != -1 else []
        shown += [f"offset={self.offset}"] if self.offset else []
        shown += [f"weight={self._parameters[self.weight_name] is not None}"]
        shown += [f"bias={self._parameters[self.bias_name] is not None}"]
        shown += [f"{name}=True" for name in ("mean_free", "folded") if getattr(self, name)]
        return ", ".join(shown)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``input`` of any float dtype along ``axis``; same shape and dtype out."""
        # The common case first, and asked of as little as can be: for one token the questions cost as much as the norm.
        if (
            not is_compiling()
            and self.mean_free
            and type(input) is Tensor
            and not torch.is_grad_enabled()
            and input.is_cpu
            and self.axis == -1
            and not (self.offset or _is_tracing() or _transforms_active())
        ):
            held, dtype = self._parameters, input.dtype
            weight, bias = held.get(self.weight_name, input), held.get(self.bias_name, input)
            if (
                weight is not input  # a parametrised weight is no parameter of the module
                and bias is not input
                and (weight is None or weight.dtype is dtype)
                and (bias is None or bias.dtype is dtype)
                and self._keeps_promise(input)
            ):
                return self._as_layer_norm(input, weight, bias)
        return self._any(input)

    def _keeps_promise(self, x: Tensor) -> bool:
        """Whether the input of a ``mean_free`` norm is so; one call in many looks, and a False is for ever."""
        until = self._until_look
        if until[0] > 0:
            until[0] -= 1
            return True
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return False  # a graph that is being captured cannot be asked
        until[0] = MEAN_CHECK_EVERY - 1
        self.mean_free = bool((x.mean(-1).abs() <= MEAN_LIMIT * x.square().mean(-1).sqrt()).all())
        return self.mean_free

    def _as_layer_norm(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """CPU: a fused LayerNorm, which is the same function here; large and without parameters, the definition."""
        size, bare = self.normalized_shape[0], weight is None and bias is None
        large = (bare or self.folded) and x.numel() >= BARE_FROM * torch.get_num_threads()
        if large and (bare or _is_identity(weight, bias, size, x.dtype)):
            if x.element_size() > 2:
                return _in_place(x.contiguous(), None, None, -1, self.eps)
            return torch.layer_norm(x, self.normalized_shape, None, None, self.eps)
        if weight is None and x.element_size() > 2:
            weight = _ones(size, x.dtype)  # the kernel without a weight takes up to three times as long
        return torch.layer_norm(x, self.normalized_shape, weight, bias, self.eps)

    def _any(self, x: Tensor) -> Tensor:
        """Every other case: compiled, traced, differentiated, on another device, along another axis."""
        axis = -1 if self.channels_last or self.axis == x.ndim - 1 else self.axis
        if self.channels_last:
            x = x.movedim(self.axis, -1)
        if axis == -1:
            x = x.contiguous()  # as layer_norm's result is, whatever its input: callers may view it
        weight, bias = self._affine(self.weight_name, axis % x.ndim, x), self._affine(self.bias_name, axis % x.ndim, x)
        if weight is not None and self.offset:
            weight = weight + self.offset
        y = self._kernel(x, weight, bias, axis)(x, weight, bias, axis, self.eps)
        return y.movedim(-1, self.axis) if self.channels_last else y

    def _affine(self, name: str, axis: int, x: Tensor) -> Tensor | None:
        """The weight or bias, shaped to broadcast along the normalised axis of x."""
        value: Tensor | None = getattr(self, name)
        trailing = x.ndim - 1 - axis
        return value.reshape(-1, *[1] * trailing) if value is not None and value.ndim == 1 and trailing else value

    def _kernel(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, axis: int = -1) -> Kernel:
        """The fastest kernel that computes this norm."""
        plain = is_compiling() or (type(x) in (Tensor, nn.Parameter) and not (_is_tracing() or _transforms_active()))
        fits = plain and axis == -1 and all(
            v is None or (v.shape == self.normalized_shape and v.dtype == x.dtype) for v in (weight, bias)
        )  # fmt: skip
        if is_compiling():
            # Exporters know the one operator (ONNX has RMSNormalization); a compiler fuses the formula.
            return _fused_rms if fits and torch.compiler.is_exporting() else _formula
        if not plain:
            return _formula
        if not fits:
            return _formula if torch.is_grad_enabled() else _in_place
        fused = x.device.type in _FUSED_RMS
        # On a GPU RMSNorm is one kernel, but it knows no bias: with one, LayerNorm is the only single kernel.
        alike = self.mean_free and not torch.is_grad_enabled() and (x.is_cpu or (fused and bias is not None))
        if alike and self._keeps_promise(x):
            return _layer_norm
        if fused:
            return _fused_rms
        if torch.is_grad_enabled():
            return _formula
        small = x.numel() < IN_PLACE_FROM[weight is not None or bias is not None]
        return _fused_rms if small and (bias is None or x.element_size() > 2) else _in_place


Kernel = Callable[[Tensor, "Tensor | None", "Tensor | None", int, float], Tensor]
"""(x, weight + offset, bias, axis, eps) -> y, shape and dtype of x."""


_is_tracing: Callable[[], bool] = torch._C._is_tracing
_transforms_active: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
"""Whether vmap or grad of torch.func is at work: values cannot be looked at then, nor results be written in place."""
_mode_active: Callable[[], bool] = getattr(torch._C, "_is_torch_function_mode_enabled", lambda: False)


def _wide(x: Tensor) -> torch.dtype:
    """The dtype to accumulate in: float32 for 16-bit inputs, the input's own otherwise."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _formula(x: Tensor, weight: Tensor | None, bias: Tensor | None, axis: int, eps: float) -> Tensor:
    """The definition, operation by operation: what autograd differentiates and a compiler fuses."""
    wide = x.to(_wide(x))
    y = wide * torch.rsqrt(wide.square().mean(axis, keepdim=True) + eps)
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    result: Tensor = y.to(x.dtype)
    return result


def _in_place(x: Tensor, weight: Tensor | None, bias: Tensor | None, axis: int, eps: float) -> Tensor:
    """The definition with one pass for the sum of squares and no temporaries but the result; not differentiable."""
    # Lean: between two large products nothing of this is in a cache, and a needless call takes as long as a small norm.
    own = x.dtype is torch.float32 or x.dtype is torch.float64
    scale = _vector_norm(x, 2, axis, True) if own else _vector_norm(x, 2, axis, True, dtype=torch.float32)
    if x.is_cpu:
        scale = torch.addcmul(_number(eps, scale.dtype), scale, scale, value=1.0 / x.shape[axis])
    else:
        scale = scale.square_().mul_(1.0 / x.shape[axis]).add_(eps)
    y: Tensor = x * scale.rsqrt_()
    if weight is not None:
        y = y.mul_(weight) if bias is None else torch.addcmul(bias.to(y.dtype), y, weight.to(y.dtype), out=y)
    elif bias is not None:
        y = y.add_(bias)
    return y if y.dtype is x.dtype else y.to(x.dtype)


_vector_norm = torch.linalg.vector_norm


def _fused_rms(x: Tensor, weight: Tensor | None, bias: Tensor | None, axis: int, eps: float) -> Tensor:
    """torch's own RMSNorm, last axis only."""
    y = F.rms_norm(x, x.shape[-1:], weight, eps)
    return y if bias is None else y + bias


def _layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, axis: int, eps: float) -> Tensor:
    """The same function where the input's mean is zero, last axis only."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


@lru_cache(maxsize=64)
def _ones(size: int, dtype: torch.dtype) -> Tensor:
    """Ones on the CPU, to be read only."""
    return torch.ones(size, dtype=dtype, device="cpu")


@lru_cache(maxsize=64)
def _zeros(size: int, dtype: torch.dtype) -> Tensor:
    """Zeros on the CPU, to be read only."""
    return torch.zeros(size, dtype=dtype, device="cpu")


def _number(value: float, dtype: torch.dtype) -> Tensor:
    """A number as a tensor on the CPU, to be read only."""
    found = _NUMBERS.get((value, dtype))
    if found is None:
        if len(_NUMBERS) >= 64:
            _NUMBERS.clear()
        found = _NUMBERS[value, dtype] = torch.tensor(value, dtype=dtype, device="cpu")
    return found


_NUMBERS: dict[tuple[float, torch.dtype], Tensor] = {}


def _is_identity(weight: Tensor | None, bias: Tensor | None, size: int, dtype: torch.dtype) -> bool:
    """Whether the weight is all ones and the bias all zeros; looked at, since nothing tells when a weight changes."""
    return (weight is None or torch.equal(weight, _ones(size, dtype))) and (
        bias is None or torch.equal(bias, _zeros(size, dtype))
    )


BASES: dict[str, Callable[[int], tuple[float, float, float, float, float]]] = {
    "paper": lambda d: (1.0, 1.0 / d, 0.0, 0.0, 1.0),
    "isometric": lambda d: (
        (1.0 - 1.0 / d) ** 0.5, 1.0 / (d + d**0.5), 1.0 / (1.0 + d**0.5), 1.0 / (d + d**0.5), d**-0.5
    ),
}  # fmt: skip
"""Bases of the mean-free vectors of size d: the numbers (s, a, b, c, e) of two maps B and L with L B = I - 11'/d,

    (B x)_i = s (x_i - a sum(x) - b x_d)    and    (L y)_i = (y_i - c sum(y)) / s,  (L y)_d = -e sum(y) / s,    i < d.

``paper`` drops the last channel (arXiv 2305.14858, section 3). In ``isometric`` the rows of B are those of the
Householder reflection that takes 1/sqrt(d) to the last axis, without its last row: orthogonal to each other and to 1.
Their length s makes the norm over d a plain RMSNorm over d - 1 numbers: |B x|^2 / (d - 1) = |P x|^2 / d.
"""


def compress(x: Tensor, axis: int, basis: str) -> Tensor:
    """B x along ``axis``, one channel less; rounded to the dtype of x once. See :data:`BASES`."""
    size = x.shape[axis]
    scale, mean, last, _, _ = BASES[basis](size)
    wide = x.to(_wide(x))
    shift = wide.sum(axis, keepdim=True) * mean
    if last:
        shift = shift + wide.narrow(axis, size - 1, 1) * last
    return ((wide.narrow(axis, 0, size - 1) - shift) * scale).to(x.dtype)


def lift(y: Tensor, axis: int, basis: str) -> Tensor:
    """L y along ``axis``, the mean-free vectors with one channel more, in the dtype to accumulate in."""
    scale, _, _, head, last = BASES[basis](y.shape[axis] + 1)
    wide = y.to(_wide(y))
    total = wide.sum(axis, keepdim=True)
    if scale == 1.0 and head == 0.0:
        return torch.cat([wide, total * -last], axis)
    return torch.cat([wide - total * head, total * -last], axis) * (1.0 / scale)


class CRMSNorm(RMSNorm):
    """The norm of a mean-free vector of ``size`` channels that is given by ``size`` - 1 numbers, B x.

    Folded, it gives such numbers again, B x / sqrt(|P x|^2 / size + eps), and its weight and bias have moved into the
    linear maps that read it. With ``expand`` it gives all channels, weight and bias applied, for readers that need
    them: what it is in place of did the same.

    Args:
        size: channels of the original norm.
        eps: as there.
        basis: one of :data:`BASES`.
        expand: give ``size`` channels.
        options: as for :class:`RMSNorm`.
    """

    def __init__(
        self, size: int, eps: float = 1e-5, *, basis: str = "isometric", expand: bool = False, **options: Any
    ) -> None:
        if basis not in BASES:
            raise ValueError(f"module edit: unknown basis {basis!r}; this file is older than the checkpoint")
        super().__init__(size if expand else size - 1, eps, **options)
        self.basis, self.expand = basis, expand

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"{super().extra_repr()}, basis={self.basis}, expand={self.expand}"

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``input`` of any float dtype along ``axis``; the same dtype out."""
        if self.expand:
            return super().forward(lift(input, self.axis, self.basis)).to(input.dtype)
        if self.basis != "paper":
            held = self._parameters
            if (  # the common case, asked of as little as can be
                not is_compiling()
                and type(input) is Tensor
                and not torch.is_grad_enabled()
                and input.is_cpu
                and self.axis == -1
                and held.get(self.weight_name, input) is None
                and held.get(self.bias_name, input) is None
                and not (_is_tracing() or _transforms_active())
            ):
                return _in_place(input if input.is_contiguous() else input.contiguous(), None, None, -1, self.eps)
            return super().forward(input)
        if self.channels_last:
            return _two_sums(input.movedim(self.axis, -1).contiguous(), -1, self.eps).movedim(-1, self.axis)
        input = input.contiguous() if self.axis in (-1, input.ndim - 1) else input
        return _two_sums(input, self.axis, self.eps)


def _two_sums(x: Tensor, axis: int, eps: float) -> Tensor:
    """x / sqrt((sum(x^2) + sum(x)^2) / d + eps) for d - 1 numbers x (CRMSNorm of arXiv 2305.14858)."""
    wide = x.to(_wide(x))
    # sum(x)^2 before the squares are added: of a mean-free vector neither is larger than d times the other
    total = wide.sum(axis, keepdim=True).square() + wide.square().sum(axis, keepdim=True)
    result: Tensor = (wide * torch.rsqrt(total * (1.0 / (x.shape[axis] + 1)) + eps)).to(x.dtype)
    return result


class Center:
    """x - mean(x) along an axis, as a forward hook or a forward pre-hook of a module; picklable, copyable, stateless.

    Args:
        side: ``output`` or ``input``.
        key: where the tensor is. Output: "" the output itself, "0" an index of a tuple or list, a name of a mapping.
            Input: "0" a positional argument, a name a keyword argument.
        axis: the axis to centre.
    """

    def __init__(self, side: str, key: str, axis: int) -> None:
        self.side, self.key, self.axis = side, key, axis

    def __call__(self, module: nn.Module, args: Any, rest: Any) -> Any:
        """As a forward hook: (module, args, output). As a pre-hook with keywords: (module, args, kwargs)."""
        if self.side == "output":
            return _replace_in(rest, self.key, self.change)
        if self.key.isdigit() and int(self.key) < len(args):
            return _replace_in(args, self.key, self.change), rest
        return args, _replace_in(rest, self.key, self.change)

    def change(self, x: Tensor) -> Tensor:
        """What is done to the tensor."""
        return center(x, self.axis)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.side!r}, key={self.key!r}, axis={self.axis})"


class Compress(Center):
    """B x along an axis, at a place as for :class:`Center`; one channel less comes out. See :data:`BASES`."""

    def __init__(self, side: str, key: str, axis: int, basis: str) -> None:
        super().__init__(side, key, axis)
        self.basis = basis

    def change(self, x: Tensor) -> Tensor:
        """What is done to the tensor."""
        return compress(x, self.axis, self.basis)


def center(x: Tensor, axis: int = -1) -> Tensor:
    """x - mean(x) along ``axis``; the difference is rounded to the dtype of x once."""
    return (x - x.mean(axis, keepdim=True, dtype=_wide(x))).to(x.dtype)


def _replace_in(value: Any, key: str, change: Callable[[Tensor], Tensor]) -> Any:
    """A copy of ``value`` with the tensor at ``key`` changed."""
    if key == "":
        return change(value)
    if isinstance(value, (tuple, list)):
        items = list(value)
        items[int(key)] = change(items[int(key)])
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    value = value.copy() if type(value) is dict else value
    value[key] = change(value[key])
    return value


def _get(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise ValueError(f"module edit: {type(model).__name__} has no module {path!r}; is it another model?") from None


_HOOKS = [name for name in vars(nn.Identity()) if "_hooks" in name]


def _replace(model: nn.Module, edit: Mapping[str, Any]) -> None:
    """Put a norm of this file where another one stands, on the same parameters."""
    path, kind = edit["path"], edit["kind"]
    if kind not in NORMS:
        raise ValueError(f"module edit: unknown norm {kind!r}; this file is older than the checkpoint")
    old = _get(model, path)
    names = {name for name in (edit.get("weight"), edit.get("bias"), *edit.get("dropped", ())) if name}
    found = set(old.state_dict(keep_vars=True))
    inner = [name for name, child in old.named_children() if not isinstance(child, nn.Identity)]
    if found != names or inner:
        raise ValueError(
            f"module edit: {path!r} ({type(old).__name__}) holds {sorted(found | set(inner))}, "
            f"expected {sorted(names)}: it is not a plain norm"
        )
    weight, bias = edit.get("weight"), edit.get("bias")
    new = NORMS[kind](
        int(edit["size"]),
        float(edit["eps"]),
        axis=int(edit.get("axis", -1)),
        offset=float(edit.get("offset", 0.0)),
        weight=getattr(old, weight) if weight else None,
        bias=getattr(old, bias) if bias else None,
        weight_name=weight or "weight",
        bias_name=bias or "bias",
        mean_free=bool(edit.get("mean_free", False)),
        folded=bool(edit.get("folded", False)),
        channels_last=bool(edit.get("channels_last", False)),
        **{key: edit[key] for key in ("basis", "expand") if key in edit},
    )
    _stand_in(model, old, new)


def _stand_in(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` wherever ``old`` stands, with its mode and hooks."""
    new.training = old.training
    for name in _HOOKS:
        new.__dict__[name] = old.__dict__[name]
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new


def _center(model: nn.Module, edit: Mapping[str, Any]) -> None:
    """Centre one input or output of a module."""
    add_hook(model, edit, Center(edit["side"], str(edit.get("key", "")), int(edit.get("axis", -1))))


def _compress(model: nn.Module, edit: Mapping[str, Any]) -> None:
    """Compress one input or output of a module."""
    add_hook(model, edit, Compress(edit["side"], str(edit.get("key", "")), int(edit["axis"]), edit["basis"]))


def add_hook(model: nn.Module, edit: Mapping[str, Any], hook: Center) -> None:
    """Let ``hook`` change one input or output of the module that ``edit`` names."""
    module = _get(model, edit["path"])
    if hook.side == "output":
        module.register_forward_hook(hook)
    else:
        module.register_forward_pre_hook(hook, with_kwargs=True)


class Absorbed(nn.Sequential):
    """What is left of a norm that has moved into its neighbours: the activation that it applied.

    The children that stay keep their names, so that their parameters do, too.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Apply what is left to ``input``."""
        for child in self:
            input = child(input)
        return input


class Clip(nn.Module):
    """clamp(x - start, lower, upper), channel by channel: what is left of a norm and the ReLU behind it.

    relu(a x + b) = a max(x + b / a, 0) if a > 0, a min(x + b / a, 0) if a < 0: the linear map that reads it takes a.

    Args:
        shape: of the three: (channels, 1, ...), which broadcasts over the input's leading dimensions.
        like: a tensor whose device and dtype they have.
        owned: the input is made for this module alone: without gradients, its memory is used for the result.
    """

    start: Tensor
    lower: Tensor
    upper: Tensor

    def __init__(self, shape: Iterable[int], like: Tensor | None = None, owned: bool = False) -> None:
        super().__init__()
        self.owned = owned
        like = torch.empty(0) if like is None else like
        self.register_buffer("start", like.new_zeros(tuple(shape)))
        self.register_buffer("lower", like.new_zeros(tuple(shape)))
        self.register_buffer("upper", like.new_full(tuple(shape), torch.inf))
        self._looked_at: tuple[Any, bool] | None = None

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"{self.start.numel()}"

    def forward(self, input: Tensor) -> Tensor:
        """Shift and clamp ``input``; same shape and dtype out."""
        held: Any = tuple(self._buffers.values())  # by name each would take as long as the arithmetic
        start, lower, upper = held
        if start.dtype is not input.dtype:  # autocast
            start, lower, upper = [vector.to(input.dtype) for vector in held]
        if is_compiling() or input.is_meta or _is_tracing() or _transforms_active():
            return torch.minimum(torch.maximum(input - start, lower), upper)
        owned = self.owned and not torch.is_grad_enabled() and type(input) is Tensor
        x = input.sub_(start) if owned else input - start
        # Each as fast as a ReLU; clamp with two tensors takes five times as long.
        return x.relu_() if self._is_relu(held[1], held[2]) else torch.minimum(torch.maximum(x, lower), upper)

    def _is_relu(self, lower: Tensor, upper: Tensor) -> bool:
        """Whether all bounds are 0 and infinity; looked at again when a tensor is another or has been written to."""
        known = self._looked_at
        versions = (0, 0) if lower.is_inference() or upper.is_inference() else (lower._version, upper._version)
        state = lower.data_ptr(), upper.data_ptr(), lower.dtype, versions
        if known is not None and known[0] == state:
            return known[1]
        if lower.is_cuda and torch.cuda.is_current_stream_capturing():
            return False  # a graph that is being captured cannot be asked
        found = bool((lower == 0).all()) and bool((upper == torch.inf).all())
        self._looked_at = state, found
        return found


def _clip(model: nn.Module, edit: Mapping[str, Any]) -> None:
    """Put a clamp where a norm and a ReLU stand: a child of the norm (``keep``), or the module ``activation``."""
    old = _get(model, edit["path"])
    sample = next((p for p in model.parameters() if p.is_floating_point()), None)
    _stand_in(model, old, Clip(edit["shape"], sample, bool(edit.get("owned"))))
    if edit.get("activation"):
        _stand_in(model, _get(model, edit["activation"]), nn.Identity())


def _absorb(model: nn.Module, edit: Mapping[str, Any]) -> None:
    """Take away a norm that has moved into its neighbours; ``keep`` names its children that still run, in order."""
    old = _get(model, edit["path"])
    children = dict(old.named_children())
    new = Absorbed()
    for name in edit.get("keep", ()):
        if name not in children:
            raise ValueError(f"module edit: {edit['path']!r} ({type(old).__name__}) has no child {name!r}")
        new.add_module(name, children[name])
    _stand_in(model, old, new if len(new) else nn.Identity())


class Affine(nn.Module):
    """y = x * (weight / sqrt(eps)) + bias, channel by channel: a norm whose statistics are fixed.

    The weight and bias are those of the norm that it stands for. With a large ``eps``, a LayerNorm that divides by
    sqrt(var + eps) computes the same of a mean-free x, so that code which knows nothing of this class can, too.

    Args:
        size: number of channels.
        eps: see above; 1.0 leaves the weight as it is.
        axis: of the channels in the input.
        weight: shape (size,), or (1, size), which no other norm loads by mistake.
        bias: shape (size,).
        weight_name: name the weight is registered under.
        bias_name: name the bias is registered under.
    """

    def __init__(
        self,
        size: int,
        eps: float = 1.0,
        *,
        axis: int = -1,
        weight: nn.Parameter | None = None,
        bias: nn.Parameter | None = None,
        weight_name: str = "weight",
        bias_name: str = "bias",
    ) -> None:
        super().__init__()
        self.normalized_shape, self.eps, self.axis = (size,), eps, axis
        self.weight_name, self.bias_name = weight_name, bias_name
        self.register_parameter(weight_name, nn.Parameter(torch.ones(size)) if weight is None else weight)
        self.register_parameter(bias_name, nn.Parameter(torch.zeros(size)) if bias is None else bias)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"{self.normalized_shape[0]}" + (f", axis={self.axis}" if self.axis != -1 else "")

    def forward(self, input: Tensor) -> Tensor:
        """Scale and shift ``input``; same shape and dtype out."""
        weight, bias = getattr(self, self.weight_name), getattr(self, self.bias_name)
        if self.eps != 1.0:
            weight = weight * self.eps**-0.5
        trailing = input.ndim - 1 - self.axis % input.ndim
        if trailing or weight.ndim > 1:
            weight, bias = weight.reshape(-1, *[1] * trailing), bias.reshape(-1, *[1] * trailing)
        return input * weight + bias


def _affine(model: nn.Module, edit: Mapping[str, Any]) -> None:
    """Put an affine map where a norm stands, on the same parameters; one that is missing is made."""
    old = _get(model, edit["path"])
    held = {name for name, _ in old.named_parameters()}
    names = {kind: edit.get(kind) or kind for kind in ("weight", "bias")}
    if held - set(names.values()):
        raise ValueError(
            f"module edit: {edit['path']!r} ({type(old).__name__}) holds {sorted(held)}, "
            f"expected {sorted(names.values())}: it is not a plain norm"
        )
    device = next((p.device for p in model.parameters()), None)
    size = int(edit["size"])
    guarded = nn.Parameter(torch.ones(1, size)) if edit.get("guarded") else None
    new = Affine(
        size,
        float(edit["eps"]),
        axis=int(edit.get("axis", -1)),
        weight=guarded if guarded is not None else getattr(old, names["weight"], None),
        bias=getattr(old, names["bias"], None),
        weight_name=names["weight"],
        bias_name=names["bias"],
    )
    _stand_in(model, old, new if device is None else new.to(device))


def _bias(model: nn.Module, edit: Mapping[str, Any]) -> None:
    """Give a linear map or convolution the bias that it was built without; zeros until weights are loaded."""
    module, name = _get(model, edit["path"]), edit.get("name", "bias")
    if module._parameters.get(name, 0) is not None:
        raise ValueError(f"module edit: {edit['path']!r} ({type(module).__name__}) is not without a {name}")
    weight: Tensor = module.get_parameter("weight")
    module.register_parameter(name, nn.Parameter(weight.new_zeros(int(edit["size"])), weight.requires_grad))


def _merge(model: nn.Module, edit: Mapping[str, Any]) -> None:
    """Put one convolution, ``merged``, in the place of a block's parallel branches; ``keep`` as for ``absorb``."""
    old = _get(model, edit["path"])
    children = dict(old.named_children())
    kinds: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
    sample = next(p for p in old.parameters() if p.is_floating_point())
    settings = {key: tuple(edit[key]) for key in ("stride", "padding", "dilation")}
    conv = kinds[len(edit["kernel"])](
        edit["inputs"], edit["outputs"], tuple(edit["kernel"]), **settings, groups=edit["groups"], device="meta"
    )
    conv = conv.to_empty(device=sample.device).to(sample.dtype)
    new = Absorbed()
    new.add_module("merged", conv)
    for name in edit.get("keep", ()):
        if name not in children:
            raise ValueError(f"module edit: {edit['path']!r} ({type(old).__name__}) has no child {name!r}")
        new.add_module(name, children[name])
    _stand_in(model, old, new)


PADDED_FROM = (64, 8)
"""CPU: rows of an input from which on a linear map of an odd number of results is slower than one of one result more:
weights kept as (outputs, inputs), and as (inputs, outputs). Measured by tools/benchmarks/writers.py."""


def _transposed(module: nn.Module) -> bool | None:
    """Whether a linear map keeps its weight as (inputs, outputs); None if its class is not known."""
    kind = type(module)
    if kind is nn.Linear:
        return False
    return True if kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils" else None


class Padded:
    """A linear map that computes one result more than it has, and drops it: its number of results is odd.

    The class of a module is exchanged for one that has this before its own class. Its parameters keep shape, values and
    names. Only the memory behind them gets room for one more: what lies there does not matter, since it is dropped.
    """

    _room: Any = None  # (wide weight, wide bias, results, the parameters' places and shapes), made by a call

    def forward(self: Any, input: Tensor) -> Tensor:
        """As the class does."""
        held = self._parameters
        if (
            is_compiling()
            or type(input) is not Tensor
            or _is_tracing()
            or input.numel() < PADDED_FROM[self._transposed] * input.shape[-1]
            or torch.is_grad_enabled()
            or not input.is_cpu
            or held.get("weight") is None  # parametrised
            or held["weight"].dtype is not input.dtype  # quantised, or autocast
            or torch.is_autocast_enabled("cpu")
            or _transforms_active()
            or _mode_active()  # whoever looks at all calls is not to see parameters move
        ):
            return self._plainly(input)
        weight, bias = held["weight"], held.get("bias")
        room = self._room
        if room is None or room[3:] != (weight.data_ptr(), weight.shape, bias if bias is None else bias.data_ptr()):
            room = self._make_room(weight, bias)
            if room is None:
                return self._plainly(input)
        return F.linear(input, room[0], room[1]).narrow(-1, 0, room[2])

    def _plainly(self: Any, input: Tensor) -> Tensor:
        plain: Tensor = super().forward(input)  # type: ignore[misc]
        return plain

    def _make_room(self: Any, weight: nn.Parameter, bias: nn.Parameter | None) -> Any:
        """Where the parameters have room now, with views of them that take it in; None if they must not move."""
        if type(weight) not in (nn.Parameter, Tensor):  # one that is read from a file when it is used, say
            return None
        if weight.is_inference() or weight.is_shared():  # made in inference mode; other processes have it, too
            return None
        across = int(self._transposed)
        wide = _with_room(weight, across)
        wide_bias = None if bias is None else _with_room(bias, 0)
        places = weight.data_ptr(), weight.shape, bias if bias is None else bias.data_ptr()
        # The views keep the memory, so no other tensor can come to lie there while they are held.
        self._room = (wide.t() if across else wide, wide_bias, weight.shape[across], *places)
        return self._room

    def _apply(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.__dict__.pop("_room", None)  # casts and other devices: the old memory is not to be kept
        return super()._apply(*args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        """Copied and pickled by its own class, since classes made on demand have no place where pickle finds them."""
        state = {name: value for name, value in self.__dict__.items() if name != "_room"}
        return _made_again, (type(self).__mro__[2],), state

    def _save_to_state_dict(self: Any, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        if self._transposed and not keep_vars and f"{prefix}weight" in destination:
            destination[f"{prefix}weight"] = destination[f"{prefix}weight"].contiguous()  # formats ask for it


def _with_room(parameter: nn.Parameter, dim: int) -> Tensor:
    """The parameter with one entry more along ``dim``, of any value; if need be it moves to where there is room."""
    size = parameter.shape[dim] + 1
    shape = (*parameter.shape[:dim], size, *parameter.shape[dim + 1 :])
    stride = parameter.stride()
    end = parameter.storage_offset() + 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    dense = stride[-1] == 1 and (dim == parameter.ndim - 1 or stride[0] == parameter.shape[-1])
    fits = end * parameter.element_size() <= parameter.untyped_storage().nbytes()
    if not (dense and fits and (dim == 0 or stride[0] >= size)):
        with torch.inference_mode(False), torch.no_grad():
            parameter.data = parameter.new_zeros(shape).narrow(dim, 0, size - 1).copy_(parameter)
        stride = parameter.stride()
    return parameter.as_strided(shape, stride)


_PADDED: dict[type, type] = {}


def _pad(module: nn.Module, old: Sequence[int], new: Sequence[int]) -> None:
    """Let a linear map whose number of results has become odd compute one more, where that is faster."""
    transposed = _transposed(module)
    if transposed is None or old[int(transposed)] % 2 or new[int(transposed)] % 2 == 0:
        return
    module.__class__ = _padded(type(module), transposed)


def _padded(kind: type, transposed: bool) -> type:
    if kind not in _PADDED:
        body = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
        _PADDED[kind] = type(kind.__name__, (Padded, kind), {**body, "_transposed": transposed})
    return _PADDED[kind]


def _made_again(kind: type) -> Any:
    module: Any = object.__new__(kind)
    module.__class__ = _padded(kind, bool(_transposed(module)))
    return module


def _resize(model: nn.Module, edit: Mapping[str, Any]) -> None:
    """Give a parameter another shape, zeros until weights are loaded; ``set`` gives attributes of the module."""
    module, name = _get(model, edit["path"]), edit["name"]
    old: Any = module._parameters.get(name, module._buffers.get(name))
    if old is None:
        raise ValueError(f"module edit: {edit['path']!r} ({type(module).__name__}) has no parameter {name!r}")
    before = tuple(old.shape)
    if old.shape != tuple(edit["shape"]):  # tied parameters stay one
        old.data = old.new_zeros(tuple(edit["shape"]))
    _set(model, edit)
    if name == "weight":
        _pad(module, before, edit["shape"])


def _set(model: nn.Module, edit: Mapping[str, Any]) -> None:
    """Give attributes of a module other values: sizes that follow those of its parameters."""
    module = _get(model, edit["path"])
    for attribute, value in edit.get("set", {}).items():
        if not hasattr(module, attribute):
            raise ValueError(f"module edit: {edit['path']!r} ({type(module).__name__}) has no {attribute!r}")
        setattr(module, attribute, tuple(value) if isinstance(value, list) else value)


NORMS: dict[str, Callable[..., nn.Module]] = {"rmsnorm": RMSNorm, "crmsnorm": CRMSNorm}
MODULE_EDITS: dict[str, Callable[[nn.Module, Mapping[str, Any]], None]] = {
    "replace": _replace,
    "center": _center,
    "absorb": _absorb,
    "bias": _bias,
    "resize": _resize,
    "merge": _merge,
    "set": _set,
    "compress": _compress,
    "affine": _affine,
    "clip": _clip,
}
STRUCTURAL = frozenset({"absorb", "affine", "bias", "clip", "resize", "merge", "set"})
"""Edits after which the weights mean something else, or are others, than in the plain architecture: they fit only with
the edits applied."""


def apply_module_edits(model: nn.Module, edits: Iterable[Mapping[str, Any]]) -> None:
    """Apply the rows of a plan to a model, in place and in order.

    Unless one of them is :data:`STRUCTURAL`, no ``state_dict`` key changes.

    Args:
        model: the original architecture; on any device, with or without weights.
        edits: rows ``{"op": "replace", "path", "kind", "size", "eps", "axis", "weight", "bias", "offset",
            "mean_free", "folded", "channels_last"}`` and
            ``{"op": "center", "path", "side", "key", "axis"}``, ``{"op": "absorb", "path", "keep"}``,
            ``{"op": "bias", "path", "name", "size"}``, ``{"op": "resize", "path", "name", "shape", "set"}``,
            ``{"op": "set", "path", "set"}``, ``{"op": "compress", "path", "side", "key", "axis", "basis"}``,
            ``{"op": "affine", "path", "size", "eps", "axis", "weight", "bias", "guarded"}``,
            ``{"op": "clip", "path", "shape", "keep", "activation", "owned"}``. A norm of kind ``crmsnorm`` also has
            ``basis``, ``expand`` and ``dropped``: parameters that leave with the old norm.

    Raises:
        ValueError: a row names a module the model lacks, a module that is more than a norm, or an unknown operation.
    """
    for edit in edits:
        if edit["op"] not in MODULE_EDITS:
            raise ValueError(f"module edit: unknown operation {edit['op']!r}; this file is older than the checkpoint")
        MODULE_EDITS[edit["op"]](model, edit)


def edits_for(model: nn.Module, section: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The edits of a config's section as they apply to ``model``, which may be another head on the converted model.

    For another class than the converted one, paths gain or lose the base model's prefix, and norms of absent heads drop
    out: a norm left as it was is always right. A centring without its place is not, so then nothing is edited at all.

    Raises:
        ValueError: tensors have other sizes since the conversion, which moved norms into the head that it saw.
    """
    edits = [dict(edit) for edit in section["modules"]]
    if section.get("architecture") == type(model).__name__:
        return edits
    if any(edit["op"] == "resize" for edit in edits):
        raise ValueError(
            f"this checkpoint was converted as {section.get('architecture')} and cannot be loaded as "
            f"{type(model).__name__}: convert the original as that"
        )
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    present = {name for name, _ in model.named_modules(remove_duplicate=False) if name}
    for edit in edits:
        path = edit["path"]
        candidates = [p for p in (path, path.removeprefix(prefix), prefix + path) if p in present]
        edit["path"] = candidates[0] if candidates else None
    if any(edit["path"] is None and edit["op"] == "center" for edit in edits):
        return []
    return [edit for edit in edits if edit["path"] is not None]


_CLASSES: dict[str, type] = {}


def converted_class(base: type) -> type:
    """The subclass of a transformers model class that applies the edits of its config when it is built.

    It keeps the name of ``base`` and belongs to this module, where pickle finds it again.
    """
    name = base.__name__
    if name in _CLASSES and _CLASSES[name].__mro__[1] is base:
        return _CLASSES[name]

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)  # type: ignore[misc]
        section = getattr(config, CONFIG_KEY)
        apply_module_edits(self, edits_for(self, section))
        if section.get("guard"):
            known = self._keys_to_ignore_on_load_unexpected or ()
            self._keys_to_ignore_on_load_unexpected = {*known, f"{re.escape(section['guard'])}$"}

    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        folder = Path(save_directory)
        if kwargs.get("is_main_process", True) and not folder.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / REMOTE_FILE).write_bytes(Path(__file__).read_bytes())
        guard = getattr(self.config, CONFIG_KEY, {}).get("guard")
        if guard:  # a tensor of no elements, which the plain class refuses to load
            state = dict(kwargs.get("state_dict") or self.state_dict())
            kwargs["state_dict"] = {**state, guard: torch.empty(0, dtype=self.dtype)}
        base.save_pretrained(self, save_directory, *args, **kwargs)  # type: ignore[attr-defined]

    body: dict[str, Any] = {"__module__": __name__, "__qualname__": name, "__doc__": base.__doc__}
    body |= {"__init__": __init__, "save_pretrained": save_pretrained}
    # The library answers these by looking at the module that holds the class; the base class's module is the one meant.
    # A class that counts as custom code would be loaded without the library's renaming and merging of weights.
    for method in ("is_custom_code", "_can_set_attn_implementation", "_can_set_experts_implementation"):
        if hasattr(base, method):
            body[method] = staticmethod(getattr(base, method))
    # GenerationMixin among the direct bases keeps the Auto classes from making yet another subclass, unknown to pickle.
    mixin = [kind for kind in base.__mro__ if kind.__name__ == "GenerationMixin"]
    _CLASSES[name] = type(name, (base, *mixin), body)
    return _CLASSES[name]


def __getattr__(name: str) -> Any:
    """``modeling_normconvert.GPT2LMHeadModel``: the converted class of a transformers class."""
    if name in _CLASSES:
        return _CLASSES[name]
    if not name.startswith("_"):
        import transformers

        base = getattr(transformers, name, None)
        if isinstance(base, type) and issubclass(base, transformers.PreTrainedModel):
            return converted_class(base)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
