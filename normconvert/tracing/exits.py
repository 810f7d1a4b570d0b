"""Ways out of a model other than its outputs: features, intermediate layers, hidden states.

They return what ``forward`` computes on its way. So nothing further is traced: what a method of features returns is
marked where ``forward`` calls it, what a model without its classifier returns where that reads it, and what the others
return is the output of modules, which is marked anyway.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, fx, nn

from normconvert.compat.torch import pytree
from normconvert.tracing.in_place_writes import boundary_of
from normconvert.tracing.probes.choose import is_timm

METHODS = ("forward_features",)
"""Methods that return features, and that ``forward`` calls."""
BY_LAYER = ("forward_intermediates", "get_intermediate_layers")
"""Methods that return the outputs of the modules which the model names as its features."""
PRE_LOGITS = "pre_logits"
HEADLESS = ("forward_head(pre_logits=True)", "num_classes=0")
"""The ways out of a timm model that return what its classifier reads."""
SIDE = "exit"
"""The side of a marker at what a method returns; no hook can stand there."""


def feature_modules(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Path of a module -> the ways out that return its output."""
    paths = dict(model.named_modules())
    if is_timm(model):
        return {path: ways_by_layer(model) for path in _named_features(model) if path in paths}
    if not hasattr(model, "main_input_name"):
        return {}
    lists = [path for path, module in paths.items() if _is_list(module)]
    outermost = [path for path in lists if not any(path.startswith(f"{other}.") for other in lists)]
    return {f"{path}.{name}": ("hidden_states",) for path in outermost for name, _ in paths[path].named_children()}


def _is_list(module: nn.Module) -> bool:
    """Whether a module holds layers one behind the other, whose outputs a model may return as its hidden states."""
    layers = list(module.children())
    alike = len({type(layer) for layer in layers}) == 1 and len(layers) > 1 and any(True for _ in layers[0].children())
    return isinstance(module, nn.ModuleList) or (isinstance(module, nn.Sequential) and alike)


def ways_by_layer(model: nn.Module) -> tuple[str, ...]:
    """The ways out of a timm model that return the outputs of layers."""
    return ("features_only", *(name for name in BY_LAYER if hasattr(model, name)))


def layers_are_named(model: nn.Module) -> bool:
    """Whether a timm model names modules that it has; a few name others, and what they return is known to nobody."""
    paths, named = dict(model.named_modules()), _named_features(model)
    return bool(named) and all(path in paths for path in named)


def _named_features(model: nn.Module) -> list[str]:
    info = getattr(model, "feature_info", None) or ()
    rows = info if isinstance(info, (list, tuple)) else getattr(info, "info", ())
    return [str(row.get("module", "")) for row in rows if isinstance(row, Mapping)]


@contextmanager
def marked_exits(model: nn.Module, hook: Callable[[str, str], Callable[..., Any]]) -> Iterator[None]:
    """Mark what the methods return, and what a classifier reads.

    Args:
        model: is given its methods back at the end.
        hook: (side, key) -> a forward hook that marks an output.
    """
    before = {name: model.__dict__.get(name) for name in METHODS if callable(getattr(model, name, None))}
    for name in before:
        model.__dict__[name] = _marking(getattr(model, name), hook(SIDE, name))
    read = [
        classifier.register_forward_pre_hook(_marking_inputs(hook(SIDE, PRE_LOGITS)))
        for classifier in _classifiers(model)
    ]
    try:
        yield
    finally:
        for handle in read:
            handle.remove()
        for name, own in before.items():
            if own is None:
                del model.__dict__[name]
            else:
                model.__dict__[name] = own


def _marking(method: Callable[..., Any], hook: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return hook(None, args, method(*args, **kwargs))

    return call


def _marking_inputs(hook: Callable[..., Any]) -> Callable[..., Any]:
    def call(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(hook(None, args, args))

    return call


def _classifiers(model: nn.Module) -> list[nn.Module]:
    """The modules that a timm model leaves out where it is asked for what they read."""
    head, getter = getattr(model, "forward_head", None), getattr(model, "get_classifier", None)
    if not is_timm(model) or getter is None or not _takes(head, PRE_LOGITS):
        return []
    found = getter()
    return [one for one in (found if isinstance(found, (tuple, list)) else (found,)) if isinstance(one, nn.Module)]


def _takes(method: Any, argument: str) -> bool:
    return callable(method) and argument in inspect.signature(method).parameters


def with_tensors(output: Any) -> Any:
    """What a model returns, with objects that ``torch.export`` does not know, a cache say, as the tensors they hold."""
    return pytree.tree_map(lambda leaf: _held(leaf, set()) if hasattr(leaf, "__dict__") else leaf, output)


def _held(value: Any, seen: set[int]) -> Any:
    """A tensor as it is; of another object its attributes, of containers their items; of a module nothing."""
    if isinstance(value, Tensor):
        return value
    # Objects may lead back to one another, and to the model.
    if isinstance(value, (nn.Module, type)) or id(value) in seen:
        return None
    seen.add(id(value))
    if isinstance(value, (list, tuple)):
        return [_held(item, seen) for item in value]
    held = value if isinstance(value, Mapping) else getattr(value, "__dict__", {})
    return {str(name): _held(item, seen) for name, item in held.items()}


def exits_in(model: nn.Module, nodes: tuple[fx.Node, ...]) -> dict[fx.Node, tuple[str, ...]]:
    """Value -> the ways out that return it."""
    modules, found = feature_modules(model), dict[fx.Node, tuple[str, ...]]()
    for node in nodes:
        if place := boundary_of(node):
            path, side, key = place
            names = modules.get(path, ()) if side == "output" else _named_by(key) if side == SIDE else ()
            if names:
                found[node] = names
    return found


def unseen_exits(model: nn.Module, unmarked: Collection[str], nodes: Iterable[fx.Node]) -> list[str]:
    """The ways out that return what has no marker: it is written to in place, or within an object that nobody opens.

    Args:
        model: that was traced.
        unmarked: the modules without markers; the empty path stands for the model's methods.
        nodes: of all calls; a module that none of them runs returns nothing.
    """
    places = [place for node in nodes if (place := boundary_of(node))]
    run, marked = {path for path, _, _ in places}, {path for path, side, _ in places if side == "output"}
    run |= {path[:at] for path in run for at, letter in enumerate(path) if letter == "."}
    unmarked = {*unmarked, *(run - marked - {""})}
    names = [name for path, ways in feature_modules(model).items() if path in unmarked for name in ways]
    if "" in unmarked:
        names += [name for name in METHODS if callable(getattr(model, name, None))]
        names += HEADLESS if _classifiers(model) else ()
    return list(dict.fromkeys(names))


def _named_by(key: str) -> tuple[str, ...]:
    """The ways out of a marker at what a method returns."""
    name = key.partition("/")[0]
    return HEADLESS if name == PRE_LOGITS else (name,)


def exit_module(node: fx.Node) -> str:
    """The module that returns the value of a way out; empty for the model itself."""
    place = boundary_of(node)
    return place[0] if place is not None else ""
