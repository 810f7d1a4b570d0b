"""Checkpoints of transformers: class, skeleton, names, loading, all as transformers 5 does it."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from normconvert.compat.transformers import builder, kept_dtypes, renaming
from normconvert.errors import InputError, first_line
from normconvert.files.code_references import OWN_MODULE
from normconvert.sources.deferred import deferred
from normconvert.sources.source import Source
from normconvert.sources.stated_sizes import in_proportion

if TYPE_CHECKING:
    import torch
    from torch import nn


TIE = "tie_word_embeddings"
"""The key of a configuration that says whether the head is the table of embeddings; each type has its own default."""


def describe(source: Source) -> Source:
    """Fill in the class name.

    Raises:
        InputError: transformers has no such class or model type, or it needs code from the checkpoint.
    """
    with deferred("scipy.optimize", "linear_sum_assignment"):
        return replace(source, architecture=_model_class(source, config_of(source)).__name__)


def stated_class(source: Source) -> str | None:
    """The class that config.json names; None if it names none."""
    names = source.config.get("architectures") or []
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None


def has_own_models(source: Source) -> bool:
    """Whether the checkpoint brings code of its own for its model."""
    return bool(set(_remote_classes(source)) - {"AutoConfig"})


def _remote_classes(source: Source) -> dict[str, str]:
    auto_map = source.config.get("auto_map") or {}
    return {k: v for k, v in auto_map.items() if isinstance(v, str) and not v.startswith(OWN_MODULE)}


def _needs_trust(source: Source, what: str) -> InputError:
    return InputError(
        f"{source.reference}: {what} is code that comes with the checkpoint; read it, then pass --trust-remote-code"
    )


def config_of(source: Source) -> Any:
    """The config object; code from the checkpoint runs only if trusted and needed."""
    from transformers import CONFIG_MAPPING, AutoConfig

    model_type = source.config.get("model_type")
    remote = _remote_classes(source)
    # A type that transformers knows needs no foreign code, whatever the checkpoint brings along.
    if "AutoConfig" in remote and not source.trust_remote_code and model_type not in CONFIG_MAPPING:
        raise _needs_trust(source, f"the configuration {remote['AutoConfig']}")
    try:
        with quiet():
            return AutoConfig.from_pretrained(
                source.folder, trust_remote_code=source.trust_remote_code, local_files_only=True
            )
    except Exception as error:
        if model_type is None and "AutoConfig" not in remote:
            name = stated_class(source)
            kind = getattr(getattr(_native(name), "config_class", None), "model_type", None)
            hint = f'; that of {name} is "{kind}"' if kind else ""
            raise InputError(
                f"{source.reference}: config.json names no model_type, which says how to read it{hint}: write it there"
            ) from error
        if model_type not in CONFIG_MAPPING:
            near = difflib.get_close_matches(str(model_type), list(CONFIG_MAPPING), 3)
            hint = f"; nearest: {', '.join(near)}" if near else ""
            raise InputError(
                f"{source.reference}: transformers does not know model_type {model_type!r}{hint}"
            ) from error
        raise InputError(f"{source.reference}: config.json is not valid: {first_line(error)}") from error


def default_config(model_type: str) -> dict[str, Any] | None:
    """What the configuration of a model type says by default, without what all say; None if there is none."""
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    if model_type not in CONFIG_MAPPING:
        return None
    said, general = CONFIG_MAPPING[model_type]().to_dict(), PreTrainedConfig().to_dict()
    return {key: value for key, value in said.items() if key == TIE or key not in general}


def _model_class(source: Source, config: Any) -> type[nn.Module]:
    import torch
    import transformers

    # What config.json does not name may have been decided by the names of the tensors.
    name = stated_class(source) or source.architecture or None
    remote = _remote_classes(source)
    if name is None and not has_own_models(source):
        try:
            with quiet(), torch.device("meta"), in_proportion(source.reference, source.tensors):
                # Built on the meta device for its class alone: AutoModel says it in no other way.
                return type(transformers.AutoModel.from_config(config))
        except Exception as error:
            raise InputError(f"{source.reference}: no class for this config.json: {first_line(error)}") from error
    native = _native(name)
    # First the checkpoint's own class, as from_pretrained takes it; only if that was allowed.
    reference = own_class(source)
    if reference is not None:
        return _remote_class(source, reference)
    if native is not None and not _converted_as(source).get("own_code"):
        return native
    if has_own_models(source) and not source.trust_remote_code:
        raise _needs_trust(source, f"the model class {name or next(iter(remote.values()))}")
    near = difflib.get_close_matches(str(name), [n for n in dir(transformers) if "For" in n or "Model" in n], 3)
    hint = f"; nearest: {', '.join(near)}" if near else ""
    raise InputError(f"{source.reference}: transformers {transformers.__version__} has no model class {name}{hint}")


def own_class(source: Source) -> str | None:
    """The class in code of the checkpoint, as ``module.Class``, if that is trusted and the class that is meant.

    A folder that was converted as transformers' own class of the name is that for good.
    """
    name = stated_class(source) or source.architecture or None
    converted = _converted_as(source)
    if source.library != "transformers" or not source.trust_remote_code:
        return None
    if converted and not converted.get("own_code") and _native(name):
        return None
    for key, reference in _remote_classes(source).items():
        if key != "AutoConfig" and (reference.split(".")[-1] == name or (name is None and key == "AutoModel")):
            return reference
    return None


def _converted_as(source: Source) -> dict[str, Any]:
    """What a converted folder's config.json says of its conversion; empty for any other."""
    section = source.config.get("normconvert")
    return section if isinstance(section, dict) else {}


def _native(name: str | None) -> type[nn.Module] | None:
    """transformers' own class of this name."""
    import transformers

    found = getattr(transformers, name, None) if name else None
    return found if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) else None


def _remote_class(source: Source, reference: str) -> type[nn.Module]:
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    try:
        with quiet():
            found: type[nn.Module] = get_class_from_dynamic_module(reference, source.folder, local_files_only=True)
    except Exception as error:
        raise InputError(f"{source.reference}: its own code failed ({reference}): {first_line(error)}") from error
    return found


def build_meta(source: Source) -> nn.Module:
    """The model on the meta device with tied weights tied; initialisation costs nothing there."""
    import torch
    from transformers import initialization

    # Lets models call .item() on what they make with linspace while they are built; not in the first releases of 5.
    safe_creation = getattr(initialization, "meta_device_safe_creation_ops", nullcontext)

    config = config_of(source)
    model_class = _model_class(source, config)
    make = builder(model_class)
    try:
        with quiet(), torch.device("meta"), safe_creation():
            model: Any = make(config, dtype=source.dtype)
            if any(not p.is_meta for p in model.parameters()):  # torch.FloatTensor(n) heeds no device in force
                model.to("meta").tie_weights()
            _keep_apart(model, source.apart)
    except Exception as error:
        raise InputError(
            f"{source.reference}: {model_class.__name__} cannot be built from its config.json: {first_line(error)}"
        ) from error
    built: nn.Module = model
    return built


def build(source: Source, dtype: torch.dtype) -> tuple[nn.Module, Callable[[str], torch.dtype | None]]:
    """The plain class on the device in force, as ``from_pretrained`` makes it, without weights.

    Returns:
        The model, and a function that gives the dtype of a parameter that is not to have that of the model's own
        parameter (norms that are kept in float32), else None.
    """
    config = config_of(source)
    model_class = _model_class(source, config)
    make = builder(model_class)
    try:
        with quiet():
            model: Any = make(config, dtype=dtype)
            _keep_apart(model, source.apart)
    except Exception as error:
        raise InputError(
            f"{source.reference}: {model_class.__name__} cannot be built from its config.json: {first_line(error)}"
        ) from error
    return model, kept_dtypes(model, dtype)


def rename(
    source: Source, model: Any, state: dict[str, torch.Tensor], adapt_prefix: bool = True
) -> tuple[dict[str, str], frozenset[str], dict[str, str]]:
    """Checkpoint names -> model names, as ``convert_and_load_state_dict_in_model`` does it (transformers 5).

    Args:
        source: its names.
        model: its class declares renamings and ties.
        state: the model's ``state_dict``.
        adapt_prefix: names may lose or gain the prefix of the base model.

    Returns:
        The map, the model names made by merging or splitting, and the declared ties (target -> source).
    """
    library = renaming()
    transforms = library.mapping(model)
    renamings = [t for t in transforms if isinstance(t, library.renaming)]
    converters: list[Any] = [t for t in transforms if isinstance(t, library.converter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    prefix = model.base_model_prefix if adapt_prefix else None
    name_map: dict[str, str] = {}
    merged: set[str] = set()
    # The order matters: some renamings are switched on by a name seen before.
    for name in sorted(source.tensors, key=library.order):
        target, pattern = library.rename(name, renamings, converters, prefix, state)
        # A renaming for older files can hit a name that is right already.
        if target not in state and name in state:
            target, pattern = library.rename(name, [], [], prefix, state)
        if target not in state:
            continue  # a stray tensor: unused by the model
        if pattern is not None:
            first, *_ = patterns = by_pattern[pattern].target_patterns
            # A split makes several tensors of one: all of them depend on it.
            merged.update(target.replace(first, other) for other in patterns)
        name_map[name] = target
    # Back in the order of the files, in which they are written.
    ordered = {name: name_map[name] for name in source.tensors if name in name_map}
    return ordered, frozenset(merged), dict(getattr(model, "all_tied_weights_keys", None) or {})


def load(source: Source, dtype: torch.dtype) -> tuple[nn.Module, set[str]]:
    """``from_pretrained`` of the plain class on the source's weights.

    Returns:
        The model, and the names of its ``state_dict`` for which no weights were found.
    """
    model_class: Any = _model_class(source, config_of(source))
    # The plain class would refuse the shapes of a converted folder.
    if source.modules:
        from normconvert.runtime import converted_class

        model_class = converted_class(model_class)
    options = {"config": config_of(source), "dtype": dtype, "local_files_only": True, "output_loading_info": True}
    try:
        with quiet():
            if source.is_pickle or source.given:
                model, info = model_class.from_pretrained(None, **options, **_unwrapped(source))
                model.name_or_path = model.config.name_or_path = str(source.folder)
            else:
                model, info = model_class.from_pretrained(source.folder, **options)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{source.reference}: transformers cannot load it: {first_line(error)}") from error
    # A merge that failed may be reported only, and not raised.
    errors = info.get("conversion_errors") or info.get("error_msgs")
    if errors:
        raise InputError(f"{source.reference}: transformers cannot load it: {first_line(ValueError(str(errors)))}")
    _keep_apart(model, source.apart)
    return model, set(info["missing_keys"])


def _keep_apart(model: nn.Module, names: Iterable[str]) -> None:
    """Give each name a parameter of its own, as ``from_pretrained`` does: see :attr:`Source.apart`."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in names:
        # Another class of the family may have no such head. What has values of its own already keeps them.
        if name in parameters and sum(p is parameters[name] for p in parameters.values()) > 1:
            path, _, leaf = name.rpartition(".")
            own = type(parameters[name])(parameters[name].detach().clone(), parameters[name].requires_grad)
            model.get_submodule(path).register_parameter(leaf, own)


def _unwrapped(source: Source) -> dict[str, Any]:
    """What ``from_pretrained`` is given in place of the folder: it would find weights as training wrapped them.

    Each time in memory of its own, since the model may keep that and change it.
    """
    from transformers import GenerationConfig

    weights = {name: source.read(name).clone() for name in source.tensors}
    try:
        generation = GenerationConfig.from_pretrained(source.folder, local_files_only=True)
    except OSError:  # as from_pretrained finds it where there is no file of its own
        generation = GenerationConfig.from_model_config(config_of(source))
    return {"state_dict": weights, "generation_config": generation}


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no advice from transformers while it works for us."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
