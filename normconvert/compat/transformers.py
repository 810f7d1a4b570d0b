"""Names of transformers that are private or told nowhere: how it builds a class and renames and casts its tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from normconvert.compat.private_names import PrivateName, attribute, gone, needed
from normconvert.errors import InputError, first_line

if TYPE_CHECKING:
    import torch

SEEN = "5.6.0, 5.24.0"
_BUILDS = "building a class as `from_pretrained` does"
_LOADS = "checkpoint names as `from_pretrained` changes them"
_CLASS = "transformers.PreTrainedModel"
NAMES = (
    PrivateName(f"{_CLASS}._from_config", _BUILDS, SEEN),
    PrivateName(f"{_CLASS}._get_dtype_plan", "`--max-memory`: weights that stay in float32", SEEN),
    PrivateName("transformers.core_model_loading.build_glob_alternation", "`--max-memory`: the same", SEEN),
    PrivateName("transformers.core_model_loading.rename_source_key", _LOADS, SEEN),
    PrivateName("transformers.core_model_loading.dot_natural_key", _LOADS, SEEN),
    PrivateName("transformers.core_model_loading.WeightConverter", _LOADS, SEEN),
    PrivateName("transformers.core_model_loading.WeightRenaming", _LOADS, SEEN),
    PrivateName("transformers.conversion_mapping.get_model_conversion_mapping", _LOADS, SEEN),
    PrivateName("transformers.AutoModel._model_mapping._model_mapping", "the classes of a model type", SEEN),
    PrivateName(f"{_CLASS}._tied_weights_keys", "heads that share a table, class by class", SEEN),
    PrivateName(
        f"{_CLASS}._keys_to_ignore_on_load_missing", "tensors that a checkpoint may lack", SEEN, "one is refused"
    ),
    PrivateName(
        f"{_CLASS}._keys_to_ignore_on_load_unexpected",
        "tensors that a checkpoint may have beside the model's; in the shipped file the guard of a fused checkpoint",
        SEEN, "a class that config.json leaves out is not found; the shipped file loads with transformers' warning",
    ),
    PrivateName(
        "transformers.PreTrainedConfig._experts_implementation", "experts in float64, which the grouped kernel lacks",
        SEEN, "the kernel's own error, in the verification",
    ),
    PrivateName(
        f"{_CLASS}._can_set_attn_implementation", "the shipped file: a converted class answers as its base", SEEN,
        "transformers says that attention cannot be exchanged",
    ),
    PrivateName(
        f"{_CLASS}._can_set_experts_implementation", "the same for experts", SEEN,
        "transformers says that experts cannot be exchanged",
    ),
)  # fmt: skip


class Renaming(NamedTuple):
    """What ``from_pretrained`` renames with.

    Attributes:
        mapping: model -> its transforms.
        converter: transforms that merge or split.
        renaming: transforms of names alone.
        order: key to sort names by.
        rename: (name, renamings, converters, prefix, state) -> (name in the model, pattern of a converter or None).
    """

    mapping: Callable[[Any], list[Any]]
    converter: type
    renaming: type
    order: Callable[[str], Any]
    rename: Callable[..., tuple[str, str | None]]


def renaming() -> Renaming:
    """The functions of the installed release.

    Raises:
        UnsupportedVersion: it has others.
    """
    with needed(NAMES):
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )
    return Renaming(get_model_conversion_mapping, WeightConverter, WeightRenaming, dot_natural_key, rename_source_key)


def builder(model_class: type) -> Callable[..., Any]:
    """(config, dtype=) -> the model as ``from_pretrained`` builds it before it loads weights.

    The constructor alone would leave out the choice of attention and the dtype of every part.

    Raises:
        UnsupportedVersion: the class has no such function.
    """
    found: Callable[..., Any] = attribute(model_class, "_from_config", NAMES)
    return found


def kept_dtypes(model: Any, dtype: torch.dtype) -> Callable[[str], torch.dtype | None]:
    """Name of a parameter -> the dtype that ``from_pretrained`` gives it in place of ``dtype``, or None.

    Raises:
        UnsupportedVersion: nothing tells.
    """
    with needed(NAMES):
        from transformers.core_model_loading import build_glob_alternation
    exceptions = attribute(model, "_get_dtype_plan", NAMES)(dtype)
    if not exceptions:
        return lambda name: None
    pattern, by_group, _ = build_glob_alternation(list(exceptions))

    def other(name: str) -> torch.dtype | None:
        match = pattern.search(name)
        return exceptions[by_group[match.lastgroup]] if match is not None else None

    return other


def auto_tables() -> dict[str, Mapping[str, Any]]:
    """Auto class -> (model type -> name of the class that it builds, or names); no model is imported.

    Raises:
        UnsupportedVersion: the Auto classes keep no such table.
    """
    from transformers.models.auto import modeling_auto

    kinds = {name: kind for name, kind in sorted(vars(modeling_auto).items()) if name.startswith("Auto")}
    lazy = {name: found for name, kind in kinds.items() if (found := getattr(kind, "_model_mapping", None)) is not None}
    if not lazy:
        raise gone(NAMES, "the Auto classes have no _model_mapping")
    # The names behind a lazy mapping, not the mapping: that would import the module of every model.
    return {name: attribute(mapping, "_model_mapping", NAMES) for name, mapping in lazy.items()}


def tied_keys(model_class: Any) -> Mapping[str, str]:
    """Target -> source of the tensors that a class declares to be one.

    Raises:
        UnsupportedVersion: classes declare nothing.
    """
    import transformers

    if not hasattr(transformers.PreTrainedModel, "_tied_weights_keys"):
        raise gone(NAMES, "its classes have no _tied_weights_keys")
    ties = getattr(model_class, "_tied_weights_keys", None)
    return ties if isinstance(ties, dict) else {}


def may_be_missing(model: object) -> tuple[str, ...]:
    """Patterns of tensors that a checkpoint of the model may lack: anything else transformers would fill at random."""
    return tuple(getattr(model, "_keys_to_ignore_on_load_missing", None) or ())


def may_be_unexpected(model: object) -> tuple[str, ...]:
    """Patterns of tensors that a checkpoint may have and the model leaves alone."""
    return tuple(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())


def plain_experts(config: Any) -> None:
    """Have experts computed by plain products where they are by a grouped kernel, which has no float64."""
    if getattr(config, "_experts_implementation", None) == "grouped_mm":
        config._experts_implementation = "batched_mm"


@contextmanager
def failures_of_tokenizer() -> Iterator[None]:
    """Whatever a tokenizer raises, as its file makes it, is an error of the input.

    Raises:
        InputError: it failed.
    """
    try:
        yield
    except BaseException as error:
        # What panics in Rust is no Exception of Python's.
        if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":
            raise
        raise InputError(f"the tokenizer cannot read a text: {first_line(error)}") from error


def token_ids(tokenizer: Any, text: str, **options: Any) -> list[int]:
    """The ids that a checkpoint's tokenizer makes of a text.

    Raises:
        InputError: it fails, in whatever way its file makes it.
    """
    with failures_of_tokenizer():
        found = tokenizer(text, **options)["input_ids"]
        if not isinstance(found, list) or not all(isinstance(one, int) for one in found):
            raise ValueError("it gives no list of numbers")
    return found
