"""Checkpoints of timm: folder or bare weights, skeleton, names, loading."""

from __future__ import annotations

import difflib
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from normconvert.compat.timm import written_config
from normconvert.errors import InputError, first_line
from normconvert.files.uninitialised import NoRandomInit
from normconvert.identification.reading import architecture
from normconvert.sources.bare_weights import creation
from normconvert.sources.converted_form import load_weights
from normconvert.sources.source import Source
from normconvert.sources.stated_sizes import check_stated_sizes, in_proportion

HEADS = 4
"""So many of the last tensors of a file may be those of its head."""


def describe(source: Source) -> Source:
    """Fill in the architecture; for weights without config.json also the configuration that says the same.

    Raises:
        InputError: timm has no such model.
    """
    import timm

    name = source.architecture or str(source.config.get("architecture"))
    # Behind the dot stands which weights, not which model.
    if not timm.is_model(name.split(".")[0]):
        near = difflib.get_close_matches(name, timm.list_models(), 3, cutoff=0.4)
        raise InputError(
            f"{source.reference}: timm {timm.__version__} has no model {name!r}; nearest: {', '.join(near)}"
        )
    source = replace(source, architecture=name)
    if source.config:
        return source
    said, notes = _said(source)
    config = _bare_config(source, said)
    arguments = config.get("model_args", {})
    notes += [f"shapes say that the model was made with {k}={v}" for k, v in arguments.items() if k not in said]
    if not config["num_classes"] and config["pretrained_cfg"].get("classifier"):
        notes.append("made without a classifier: the file holds none that timm knows as this model's")
    return replace(source, config=config, described=True, notes=(*source.notes, *notes))


def _said(source: Source) -> tuple[dict[str, Any], list[str]]:
    """The arguments that the model was made with in training, as the file tells them, and what to say of them.

    Raises:
        InputError: they are none, or out of all proportion to the weights.
    """
    if not source.training:
        return {}, []
    trained, name = architecture(str(source.training["model"])), source.architecture.split(".")[0]
    if trained != name:
        return {}, [f"the file's args are of {trained}: they are not used"]
    try:
        said = creation(source.training)
    except InputError as error:
        raise InputError(f"{source.reference}: {error}") from error
    check_stated_sizes(source.reference, {"model_args": said}, source.tensors)
    return said, [f"the file's args say that the model was made with {k}={v}" for k, v in said.items()]


def _bare_config(source: Source, said: dict[str, Any]) -> dict[str, Any]:
    """A config.json as timm writes it, with the number of classes, the image size and the channels of the weights.

    Args:
        source: without a configuration.
        said: arguments that the model was made with.
    """
    name = source.architecture.split(".")[0]
    with in_proportion(source.reference, source.tensors):
        model = _plain(source, said)
    pretrained = written_config(dict(getattr(model, "pretrained_cfg", {})))
    pretrained.pop("architecture", None)
    classifier = pretrained.get("classifier") or ()
    classifiers = [classifier] if isinstance(classifier, str) else list(classifier)
    classes = getattr(model, "num_classes", 0)
    if classifiers:
        head = source.tensors.get(f"{classifiers[0]}.weight")
        # As many as the weights have: with the default number they would not fit.
        classes = head.shape[0] if head and head.shape else _classes_elsewhere(source, model, said)
    pretrained["num_classes"] = classes
    config = {"architecture": name, "num_classes": classes, "num_features": getattr(model, "num_features", None)}
    if arguments := {**said, **(_arguments(source, name, model, classifiers) or {})}:
        config["model_args"] = arguments
        channels, *side = pretrained.get("input_size", (3, 224, 224))
        if size := arguments.get("img_size"):
            side = list(size) if isinstance(size, (list, tuple)) else [size] * 2
        pretrained["input_size"] = [arguments.get("in_chans", channels), *side]
    return {k: v for k, v in config.items() if v is not None} | {"pretrained_cfg": pretrained}


def _classes_elsewhere(source: Source, model: nn.Module, said: dict[str, Any]) -> int:
    """The number of classes of a head that the file has under a name that timm's own filter knows; else 0."""
    strays = [info.shape[0] for name, info in source.tensors.items() if name not in model.state_dict() and info.shape]
    name = source.architecture.split(".")[0]
    for classes in [count for count, _ in Counter(strays[-HEADS:]).most_common()]:
        config = {"architecture": name, "num_classes": classes, "model_args": said}
        with suppress(InputError):
            _load_filtered(replace(source, config=config, described=True))
            return classes
    return 0


def _plain(source: Source, said: dict[str, Any]) -> nn.Module:
    """The model with default arguments but for those that are said, on the meta device where it can be made there."""
    import timm

    try:
        with torch.device("meta"):
            return timm.create_model(source.architecture, pretrained=False, **said)
    except InputError:
        raise
    except Exception:  # models that compute on tensors while they are built
        pass
    try:
        with NoRandomInit():
            return timm.create_model(source.architecture, pretrained=False, **said)
    except InputError:
        raise
    except Exception as error:
        line = str(error).strip().split("\n")[0] or type(error).__name__
        given = f" with {', '.join(f'{k}={v}' for k, v in said.items())}" if said else ""
        raise InputError(f"{source.reference}: timm cannot build {source.architecture}{given}: {line}") from error


def _arguments(source: Source, name: str, model: nn.Module, classifiers: list[str]) -> dict[str, int] | None:
    """The image size and input channels that the weights were trained with, if they are not the default ones.

    None if the weights fit as they are, or with no other arguments either.
    """
    from normconvert.identification import arguments, building, names_of, prints

    heads = {f"{classifier}.{part}" for classifier in classifiers for part in ("weight", "bias")}
    state = {n: tuple(tensor.shape) for n, tensor in model.state_dict().items() if n not in heads}
    # The usual case is settled before models are built to explain a difference.
    if all(n not in state or state[n] == info.shape for n, info in source.tensors.items()):
        return None
    names = names_of(source.tensors, ())
    known = building.timm_print(name)
    return arguments.solve(known, prints.compare(names.shapes, names.integers, known), names.shapes, names.integers)


def _create(source: Source, *, pretrained: bool = False, **options: Any) -> nn.Module:
    """timm's own factory; a folder is read by timm (``local-dir:``), a bare file is described by ``source.config``."""
    import timm

    try:
        # timm reads the folder's configuration by itself, with all that it knows of it.
        if not source.described:
            model: nn.Module = timm.create_model(f"local-dir:{source.folder}", pretrained=pretrained, **options)
        else:
            options |= source.config.get("model_args", {})
            classes = source.config["num_classes"]
            model = timm.create_model(source.architecture, pretrained=pretrained, num_classes=classes, **options)
    except Exception as error:
        raise InputError(f"{source.reference}: timm cannot build {source.architecture}: {first_line(error)}") from error
    return model


def build_meta(source: Source) -> nn.Module:
    """The model on the meta device; models that compute on tensors while they are built are built on the CPU."""
    try:
        with torch.device("meta"):
            return _create(source)
    except InputError:
        with NoRandomInit():
            return _create(source)


def build(source: Source) -> nn.Module:
    """The model on the device in force, without random initialisation; the weights are the caller's to load."""
    with NoRandomInit():
        return _create(source)


def rename(source: Source, state: dict[str, torch.Tensor]) -> tuple[dict[str, str], frozenset[str]]:
    """timm's names are the model's names, except in original checkpoints, which timm's own filters turn into its form.

    Returns:
        The map, and the model names made by such a filter (all or none).
    """
    name_map = {name: name for name in source.tensors if name in state}
    fits = set(state) <= set(name_map) and all(source.tensors[n].shape == tuple(state[n].shape) for n in name_map)
    # That the filter gives every tensor can only be seen by loading: it is a function, not a table.
    if not fits:
        with suppress(InputError):
            _load_filtered(source)
            return name_map, frozenset(state)
    return name_map, frozenset()


@contextmanager
def _nothing_missing() -> Iterator[None]:
    """timm loads some models leniently, and leaves what is missing as it was: here that is an error."""

    def loaded(module: nn.Module, keys: Any) -> None:
        if keys.missing_keys:
            raise RuntimeError(f"tensors {', '.join(keys.missing_keys[:3])} are missing")

    hooked: set[nn.Module] = set()
    thread = threading.get_ident()

    def child_added(module: nn.Module, name: str, child: nn.Module | None) -> None:
        if threading.get_ident() == thread and module not in hooked:  # the hook is asked for all threads' modules
            hooked.add(module)
            handles.append(module.register_load_state_dict_post_hook(loaded))

    # The model is made and loaded in one call of timm: it is met when it is given its parts.
    handles = [register_module_module_registration_hook(child_added)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _load_filtered(source: Source) -> nn.Module:
    """The model with its weights put through the filter timm has for this architecture; none may be missing."""
    weights = {name: source.read(name) for name in source.tensors}
    with NoRandomInit(), _nothing_missing():
        # As timm loads weights it has downloaded, through the same filter, but from memory.
        overlay: dict[str, Any] = {"source": "", "state_dict": weights}
        if source.described and source.config["num_classes"]:
            overlay["num_classes"] = source.config["num_classes"]  # a head of another number would be dropped
        return _create(source, pretrained=True, pretrained_cfg_overlay=overlay)


def load(source: Source, dtype: torch.dtype) -> tuple[nn.Module, set[str]]:
    """timm's factory, then the weights.

    Returns:
        The model, and the names of its ``state_dict`` for which there were no weights.
    """
    if source.merged:
        return _load_filtered(source).to(dtype), set()
    with NoRandomInit():
        model = _create(source)
    return load_weights(source, model, dtype, "timm")
