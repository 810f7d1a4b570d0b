"""Identity operations at the boundaries of modules, and at what methods of features return, as markers of places."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from normconvert.compat.torch import DisableTorchFunction
from normconvert.tracing.exits import feature_modules, marked_exits
from normconvert.tracing.in_place_writes import boundary_marker
from normconvert.tracing.own_hooks import has_own_hooks, mark_watched


@contextmanager
def marked(model: nn.Module, without: Set[str]) -> Iterator[None]:
    """Hooks that put a marker at each floating tensor that enters or leaves a module worth naming."""
    with ExitStack() as stack:
        features = feature_modules(model)
        if "" not in without:
            stack.enter_context(marked_exits(model, lambda side, key: _mark_outputs("", side, key)))
        for path, module in model.named_modules():
            watched = has_own_hooks(module)
            if not path or path in without:
                continue
            if watched:
                mark_watched(path, module, stack)
            if isinstance(module, _UNMARKED) and path not in features and not watched:
                continue
            pre = module.register_forward_pre_hook(_mark_inputs(path), with_kwargs=True)
            stack.callback(pre.remove)
            post = module.register_forward_hook(_mark_outputs(path))
            stack.callback(post.remove)
        yield


_UNMARKED = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout),
    *(nn.Linear, nn.Identity, nn.GELU, nn.ReLU, nn.SiLU),
)
"""Modules whose boundary is never a better place than their neighbours': the graph stays small."""


def _markable(value: object) -> bool:
    if not isinstance(value, Tensor):
        return False
    # One number may be a constant, whose value torch computes while it traces, where a custom operation cannot run.
    with DisableTorchFunction():  # or the modes of a trace would be asked for each of the three
        return value.is_floating_point() and value.ndim >= 2 and value.numel() > 1


def _mark_inputs(path: str) -> Callable[..., Any]:
    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if len(args) + len(kwargs) > 1 and not any(True for _ in module.children()):
            return args, kwargs  # a norm that takes more than its input is no norm that another could stand in for
        new_args = tuple(boundary_marker(a, path, "input", str(i)) if _markable(a) else a for i, a in enumerate(args))
        new_kwargs = {k: boundary_marker(a, path, "input", k) if _markable(a) else a for k, a in kwargs.items()}
        return new_args, new_kwargs

    return hook


def _mark_outputs(path: str, side: str = "output", name: str = "") -> Callable[..., Any]:
    def named(key: str) -> str:
        return f"{name}/{key}" if name and key else name or key

    def hook(module: nn.Module | None, args: tuple[Any, ...], output: Any) -> Any:
        if _markable(output):
            return boundary_marker(output, path, side, named(""))
        # Not isinstance: a named tuple cannot be made of an iterator.
        if type(output) in (tuple, list):
            return type(output)(
                boundary_marker(a, path, side, named(str(i))) if _markable(a) else a for i, a in enumerate(output)
            )
        if isinstance(output, dict):  # transformers' ModelOutput among them
            for key, value in list(output.items()):
                if _markable(value):
                    output[key] = boundary_marker(value, path, side, named(str(key)))
        return output

    return hook
