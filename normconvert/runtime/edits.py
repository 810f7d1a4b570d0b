"""Module edits: rows of a plan, applied to a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from normconvert.runtime.affine import Affine, Clip, PostActivation
from normconvert.runtime.attention import attend
from normconvert.runtime.hooks import Center, Compress, add_hook
from normconvert.runtime.modules import get_module, run_by_calls, stand_in
from normconvert.runtime.norms import NORMS
from normconvert.runtime.padding import pad
from normconvert.runtime.renaming import rename
from normconvert.runtime.schema import check_module_edits, check_sizes


def contents(module: nn.Module) -> set[str]:
    """Names of what would be lost with a module: what a checkpoint holds of it, and children that do something."""
    children = {name for name, child in module.named_children() if not isinstance(child, nn.Identity)}
    return set(module.state_dict(keep_vars=True)) | children


def _replace(model: nn.Module, edit: Mapping[str, Any]) -> None:
    """Put a norm of this file where another one stands, on the same parameters."""
    path, kind = edit["path"], edit["kind"]
    if kind not in NORMS:
        raise ValueError(f"module edit: unknown norm {kind!r}; this file is older than the checkpoint")
    old = get_module(model, path)
    names = {name for name in (edit.get("weight"), edit.get("bias"), *edit.get("dropped", ())) if name}
    found = contents(old)
    if found != names:
        raise ValueError(
            f"module edit: {path!r} ({type(old).__name__}) holds {sorted(found)}, "
            f"expected {sorted(names)}: it is not a plain norm"
        )
    weight, bias = edit.get("weight"), edit.get("bias")
    # ``mean_free`` and ``folded`` are facts of the proof: of the input, and that weight and bias have become ones and
    # zeros. A norm computes the same whether they hold or not, so nothing here reads them.
    new = NORMS[kind](
        int(edit["size"]),
        float(edit["eps"]),
        axis=int(edit.get("axis", -1)),
        offset=float(edit.get("offset", 0.0)),
        weight=getattr(old, weight) if weight else None,
        bias=getattr(old, bias) if bias else None,
        weight_name=weight or "weight",
        bias_name=bias or "bias",
        channels_last=bool(edit.get("channels_last", False)),
        **{key: edit[key] for key in ("basis", "expand") if key in edit},
    )
    if kind == "crmsnorm":  # of a mean-free value RMSNorm is what LayerNorm is, and the kernel may do it
        run_by_calls(model, old)
    stand_in(model, old, new)


def _center(model: nn.Module, edit: Mapping[str, Any]) -> None:
    """Centre one input or output of a module."""
    place = edit["side"], str(edit.get("key", "")), int(edit.get("axis", -1))
    add_hook(model, edit, Center(*place, bool(edit.get("optional"))))


def _compress(model: nn.Module, edit: Mapping[str, Any]) -> None:
    """Compress one input or output of a module."""
    place = edit["side"], str(edit.get("key", "")), int(edit["axis"])
    add_hook(model, edit, Compress(*place, edit["basis"], bool(edit.get("optional")), edit.get("size")))


def _clip(model: nn.Module, edit: Mapping[str, Any]) -> None:
    """Put a clamp where a norm and a ReLU stand: a child of the norm (``keep``), or the module ``activation``."""
    old = get_module(model, edit["path"])
    sample = next((p for p in model.parameters() if p.is_floating_point()), None)
    stand_in(model, old, Clip(edit["shape"], sample, bool(edit.get("owned"))))
    if edit.get("activation"):
        stand_in(model, get_module(model, edit["activation"]), nn.Identity())


def _absorb(model: nn.Module, edit: Mapping[str, Any]) -> None:
    """Take away a norm that has moved into its neighbours; ``keep`` names its children that still run, in order."""
    old = get_module(model, edit["path"])
    children = dict(old.named_children())
    new = PostActivation()
    for name in edit.get("keep", ()):
        if name not in children:
            raise ValueError(f"module edit: {edit['path']!r} ({type(old).__name__}) has no child {name!r}")
        new.add_module(name, children[name])
    stand_in(model, old, new if len(new) else nn.Identity())


def _affine(model: nn.Module, edit: Mapping[str, Any]) -> None:
    """Put an affine map where a norm stands, on the same parameters; one that is missing is made."""
    old = get_module(model, edit["path"])
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
    run_by_calls(model, old)
    stand_in(model, old, new if device is None else new.to(device))


def _bias(model: nn.Module, edit: Mapping[str, Any]) -> None:
    """Give a linear map or convolution the bias that it was built without; zeros until weights are loaded."""
    module, name = get_module(model, edit["path"]), edit.get("name", "bias")
    if name in vars(module) or getattr(module, name, 0) is not None:  # registered, and None
        raise ValueError(f"module edit: {edit['path']!r} ({type(module).__name__}) is not without a {name}")
    weight: Tensor = module.get_parameter("weight")
    module.register_parameter(name, nn.Parameter(weight.new_zeros(int(edit["size"])), weight.requires_grad))


def _merge(model: nn.Module, edit: Mapping[str, Any]) -> None:
    """Put one convolution, ``merged``, in the place of a block's parallel branches; ``keep`` as for ``absorb``."""
    old = get_module(model, edit["path"])
    children = dict(old.named_children())
    kinds: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
    sample = next(p for p in old.parameters() if p.is_floating_point())
    settings = {key: tuple(edit[key]) for key in ("stride", "padding", "dilation")}
    conv = kinds[len(edit["kernel"])](
        edit["inputs"], edit["outputs"], tuple(edit["kernel"]), **settings, groups=edit["groups"], device="meta"
    )
    conv = conv.to_empty(device=sample.device).to(sample.dtype)
    new = PostActivation()
    new.add_module("merged", conv)
    for name in edit.get("keep", ()):
        if name not in children:
            raise ValueError(f"module edit: {edit['path']!r} ({type(old).__name__}) has no child {name!r}")
        new.add_module(name, children[name])
    stand_in(model, old, new)


def _resize(model: nn.Module, edit: Mapping[str, Any]) -> None:
    """Give a parameter another shape, zeros until weights are loaded; ``set`` gives attributes of the module."""
    module, name = get_module(model, edit["path"]), edit["name"]
    old = getattr(module, name, None)
    if not isinstance(old, Tensor):
        raise ValueError(f"module edit: {edit['path']!r} ({type(module).__name__}) has no parameter {name!r}")
    before = tuple(old.shape)
    if len(before) != len(edit["shape"]) or any(new > was for was, new in zip(before, edit["shape"], strict=True)):
        raise ValueError(f"module edit: {edit['path']!r} has no {name!r} of {edit['shape']} or more, but {before}")
    if old.shape != tuple(edit["shape"]):  # tied parameters stay one
        old.data = old.new_zeros(tuple(edit["shape"]))
    _set(model, edit)
    if name == "weight":
        pad(module, before, edit["shape"])


def _set(model: nn.Module, edit: Mapping[str, Any]) -> None:
    """Give attributes of a module other values: sizes that follow those of its parameters."""
    module = get_module(model, edit["path"])
    for attribute, value in edit.get("set", {}).items():
        old = getattr(module, attribute, None)
        new = tuple(value) if isinstance(value, list) else value
        # Sizes only, and none larger than it was: no row may switch anything on or put another thing in place.
        sizes = [(old, new)] if not isinstance(new, tuple) else list(zip(old or (), new, strict=True))
        if not sizes or any(type(a) is not int or b > a for a, b in sizes):
            raise ValueError(
                f"module edit: {edit['path']!r} ({type(module).__name__}) has no {attribute!r}, a size of {new} or more"
            )
        setattr(module, attribute, new)


def _epsilon(model: nn.Module, edit: Mapping[str, Any]) -> None:
    """Give a norm another eps, under each name that its module keeps it by."""
    module = get_module(model, edit["path"])
    for name in edit["attributes"]:
        if type(vars(module).get(name)) is not float:
            raise ValueError(f"module edit: {edit['path']!r} ({type(module).__name__}) has no number {name!r}")
        setattr(module, name, float(edit["eps"]))


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
    "epsilon": _epsilon,
    "renew": _replace,
    "attend": attend,
    "rename": rename,
}
STRUCTURAL = frozenset({"absorb", "affine", "attend", "bias", "clip", "resize", "merge", "set", "rename"})
"""Edits after which the weights mean something else, or are others, than in the plain architecture: they fit only with
the edits applied."""


def apply_module_edits(model: nn.Module, edits: Iterable[Mapping[str, Any]]) -> None:
    """Apply the rows of a plan to a model, in place and in order.

    Unless one of them is :data:`STRUCTURAL`, no ``state_dict`` key changes.

    Args:
        model: the original architecture; on any device, with or without weights.
        edits: rows ``{"op": "replace", "path", "kind", "size", "eps", "axis", "weight", "bias", "offset",
            "mean_free", "folded", "channels_last"}`` and
            ``{"op": "center", "path", "side", "key", "axis", "optional"}``, ``{"op": "absorb", "path", "keep"}``,
            ``{"op": "bias", "path", "name", "size"}``, ``{"op": "resize", "path", "name", "shape", "set"}``,
            ``{"op": "set", "path", "set"}``,
            ``{"op": "compress", "path", "side", "key", "axis", "basis", "optional", "size"}``,
            ``{"op": "affine", "path", "size", "eps", "axis", "weight", "bias", "guarded"}``,
            ``{"op": "clip", "path", "shape", "keep", "activation", "owned"}``,
            ``{"op": "epsilon", "path", "attributes", "eps", "stated"}``; ``renew`` is ``replace`` with another eps,
            where no attribute of the module holds it; ``{"op": "attend", "path", "heads", "size", "grid", "prefix"}``,
            ``{"op": "rename", "path", "name"}``. A norm of kind ``crmsnorm`` also has
            ``basis``, ``expand`` and ``dropped``: parameters that leave with the old norm.

    Raises:
        ValueError: a row names a module the model lacks, a module that is more than a norm, or an unknown operation.
    """
    rows = list(edits)
    check_module_edits(rows)
    check_sizes(model, rows)
    for edit in rows:
        try:
            MODULE_EDITS[edit["op"]](model, edit)
        # A row may be of the right form and still say what this module does not allow.
        except (TypeError, KeyError, AttributeError, IndexError, RuntimeError, StopIteration) as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"module edit: {edit['op']} does not fit {edit['path']!r}: {first}") from error
