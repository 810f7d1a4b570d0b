"""What a model answers when it is asked: whether it takes inputs, what its images need, how many features they give.

It runs in the fake mode that `torch.export` uses, since models ask whether they are traced. Nothing is computed.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from normconvert.compat.torch import as_exported
from normconvert.tracing.calls import without_values
from normconvert.tracing.constant_buffers import constant_buffers, in_place
from normconvert.tracing.known_values import known_values
from normconvert.tracing.model_caches import fresh_caches
from normconvert.tracing.pretend_cpu import on_either_device, pretending
from normconvert.tracing.probes.facts import Facts

FEATURES = {
    "pixel_values": ("get_image_features",),
    "pixel_values_videos": ("get_video_features",),
    "input_features": ("get_audio_features",),
    "input_values": ("get_audio_features",),
}
"""Signal argument -> the model's method that turns it into the features that replace the placeholders."""
PROJECTORS = ("multi_modal_projector",)
"""Modules whose outputs are the features, where the model has no method for them."""
FEW = 64
"""Numbers of an input of whole numbers that are looked at one by one."""
TEXT = ("input_ids", "attention_mask")
"""Arguments that belong to the text, whoever else looks at them."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Wrong guesses are expected: keep what torch logs about them off the user's screen."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def call_fake(model: nn.Module, function: Callable[..., Any], inputs: dict[str, Any]) -> Any:
    """Call a model, or a method of it, on inputs of these shapes in fake mode.

    Values of inputs on the CPU are known meanwhile (see :mod:`normconvert.tracing.known_values`).
    """
    constants = constant_buffers(model)

    def call(device: str, watch: contextlib.AbstractContextManager[Any]) -> Any:
        with fresh_caches(model), pretending(model, device), as_exported():  # or a trace would refuse what runs here
            fake = without_values(inputs, device)
            with watch, known_values(inputs, fake, in_place(model, constants)):
                return function(**fake)

    return on_either_device(call)


def needed(facts: Facts, signal: str) -> list[str]:
    """Arguments of ``forward`` that the method which makes a signal's features cannot do without, beside it."""
    names: list[str] = []
    for owner, method in _methods(facts.model, signal):
        for name, parameter in inspect.signature(getattr(owner, method)).parameters.items():
            if parameter.default is parameter.empty and name in facts.parameters and name not in (signal, *TEXT):
                names.append(name)
    return list(dict.fromkeys(names))


def feature_count(facts: Facts, signal: str, inputs: dict[str, Any]) -> int:
    """How many placeholders one signal's features fill in all, asked of the model itself; 0 if it does not say."""
    given = {name: x for name, x in inputs.items() if isinstance(x, Tensor) and name not in TEXT}
    # Grids and sizes count by their values, signals by their shape.
    told = (
        (n, str(tuple(x.shape) if x.is_floating_point() or x.numel() > FEW else x.tolist())) for n, x in given.items()
    )
    key = (signal, *sorted(told))
    if key not in facts.counted:
        facts.counted[key] = _feature_count(facts, signal, inputs)
    return facts.counted[key]


def _feature_count(facts: Facts, signal: str, inputs: dict[str, Any]) -> int:
    """The answer.

    Its method of features is called with the inputs that it names. Where that is not enough for it, or where there is
    none, ``forward`` is, and what the method or the projector gives on the way is counted, whatever becomes of it.
    """
    methods = list(_methods(facts.model, signal))
    for owner, name in methods:
        method = getattr(owner, name)
        taken = inspect.signature(method).parameters
        with quiet(), contextlib.suppress(Exception):  # whatever a model raises that wants more
            return _rows(call_fake(facts.model, method, {k: v for k, v in inputs.items() if k in taken}))
    found: list[int] = []
    with contextlib.ExitStack() as stack:
        for owner, name in methods:
            stack.enter_context(_counted(owner, name, found))
        for module in _projectors(facts.model) if signal in FEATURES and not methods else ():
            hook = module.register_forward_hook(lambda module, args, result: found.append(_rows(result)))
            stack.callback(hook.remove)
        with quiet(), contextlib.suppress(Exception):  # placeholders are still missing
            call_fake(facts.model, facts.model, inputs)
    if found:
        return found[0]
    return facts.number("image_seq_length", "mm_tokens_per_image", "num_image_tokens", "image_seq_len")


def _projectors(model: nn.Module) -> Iterator[nn.Module]:
    return (module for name, module in model.named_modules() if name.rpartition(".")[2] in PROJECTORS)


def _methods(model: nn.Module, signal: str) -> Iterator[tuple[nn.Module, str]]:
    """The methods of a signal's features by name, of the model and of the one within its head, with their owners."""
    for name in FEATURES.get(signal, ()):
        for owner in dict.fromkeys((model, getattr(model, "base_model", model))):
            if getattr(owner, name, None) is not None:
                yield owner, name


@contextlib.contextmanager
def _counted(owner: nn.Module, name: str, found: list[int]) -> Iterator[None]:
    """Meanwhile the numbers of feature vectors that a method of a module returns are put into ``found``."""
    method = getattr(owner, name)

    def counting(*args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        found.append(_rows(result))
        return result

    # Beside the class's own, on the instance alone.
    own = owner.__dict__.get(name)
    owner.__dict__[name] = counting
    try:
        yield
    finally:
        del owner.__dict__[name]
        if own is not None:
            owner.__dict__[name] = own


def _rows(value: Any) -> int:
    """Feature vectors in the output of a ``get_*_features`` method (..., width)."""
    if not isinstance(value, (tuple, list, Tensor)):
        pooled = getattr(value, "pooler_output", None)
        value = value.last_hidden_state if pooled is None else pooled
    if isinstance(value, Tensor):
        return value.numel() // value.shape[-1]
    return sum(_rows(item) for item in value)
