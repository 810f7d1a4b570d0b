"""What a recipe may say, as pydantic models: they check it, and their JSON Schema lets editors complete it.

Methods, options and figures are taken from where the rest of the package has them, so a recipe knows what the installed
version knows.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import MISSING, fields
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    create_model,
    model_validator,
)

from normconvert import options as conversion
from normconvert.errors import InputError
from normconvert.option_fields import about, parse_size, types
from normconvert.verification.limits import FIGURES

OUTPUT = "out/{name}-{variant}"
NARROWEST = {"algebra": 1e-5, "rounding": 3.0}
"""What every conversion is held to at least; a recipe's limit may only be narrower."""


UNSET: Any = None
"""For keys that may be left out. What a recipe does not say is not in a part's ``model_fields_set``."""


class Part(BaseModel):
    """Any mapping of a recipe: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def _known_method(name: str) -> str:
    if name not in conversion.METHODS:
        near = difflib.get_close_matches(name, conversion.METHODS, 1, cutoff=0.5)
        hint = f"; nearest: {near[0]}" if near else ""
        raise ValueError(f"unknown method {name!r}; expected one of {', '.join(conversion.METHODS)}{hint}")
    return name


def _known_size(text: str | int) -> int:
    try:
        return parse_size(str(text), "size")
    except InputError:
        raise ValueError(f"expected a size such as 5GB, 500MB or 2GiB, found {text!r}") from None


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Method = Annotated[str, AfterValidator(_known_method), Field(json_schema_extra={"enum": list(conversion.METHODS)})]
Bytes = Annotated[int, BeforeValidator(_known_size, json_schema_input_type=str | int)]
Patterns = Annotated[tuple[str, ...], BeforeValidator(_as_list, json_schema_input_type=str | list[str])]


def _fields_of(request: type[Any], names: Iterable[str]) -> dict[str, Any]:
    """Fields of a model for options of a request that a recipe may set, each of which may be left out."""
    hints = types(request)
    made: dict[str, Any] = {}
    for name, default, known in about(request):
        if name not in names:
            continue
        kind: Any = _without_none(hints[name])
        if known.choices:
            spellings = (*known.choices, *known.aliases)
            kind = Annotated[
                Literal[known.choices], BeforeValidator(known.settled, json_schema_input_type=Literal[spellings])
            ]
        elif known.parse is not None:
            kind = Bytes
        extra = {} if default in (MISSING, None) else {"default": default}
        made[name] = (kind, Field(None, description=known.help, json_schema_extra=extra))
    return made


def _without_none(hint: Any) -> Any:
    """A type that may be None, in Options for what depends on the method, without it: here such a field is left out."""
    rest = [kind for kind in get_args(hint) if kind is not type(None)]
    return rest[0] if len(rest) == 1 < len(get_args(hint)) else hint


ALLOWED = [one.name for one in fields(conversion.Options)]
"""What a recipe says under ``options``."""
SETTINGS = [name for name, _, known in about(conversion.Conversion) if known.recipe and name not in ALLOWED]
"""Further options of a conversion, which stand beside ``options``."""


class _CheckedOptions(Part):
    """Options of the conversions; one that a method does not know has no effect there."""

    @model_validator(mode="after")
    def _check(self) -> _CheckedOptions:
        try:
            conversion.Options(**self.model_dump(exclude_unset=True)).check()
        except InputError as error:
            raise ValueError(str(error)) from None
        return self


def _limits_model() -> type[Part]:
    """The figures of a verification, each of which may be given a limit."""
    made: dict[str, Any] = {}
    for figure in FIGURES:
        largest = NARROWEST.get(figure.name, figure.largest)
        top = None if largest == float("inf") else largest
        words = f"{figure.words[0].upper()}{figure.words[1:]}: {'at least' if figure.at_least else 'at most'} this."
        made[figure.name] = (float, Field(None, description=words, ge=0, le=top))
    return create_model("Limits", __base__=Part, __doc__=_LIMITS, **made)


_LIMITS = """Limits on the figures of the verification, narrower than those that every conversion is held to.

A job whose result is out of them fails, and its output does not appear.
"""

Options = create_model("Options", __base__=_CheckedOptions, **_fields_of(conversion.Options, ALLOWED))
Limits = _limits_model()


class ResourcesPart(Part):
    """What a job needs; by default one core, one GPU if it runs on CUDA, and the memory that is estimated."""

    cpus: Annotated[float, Field(gt=0)] = UNSET
    """Cores, on a Ray cluster."""
    gpus: Annotated[float, Field(ge=0)] = UNSET
    """GPUs, on a Ray cluster."""
    memory: Bytes = UNSET
    """Memory at the peak, such as 12GB, instead of the estimate."""


class UploadPart(Part):
    """Upload of a finished output to the hub. Off unless ``enabled`` says otherwise."""

    enabled: bool = UNSET
    """Whether to upload; false by default."""
    repo: str = UNSET
    """The repository, such as ``me/{name}-{variant}``; placeholders as in ``output``."""
    private: bool = UNSET
    """Make the repository a private one if it has to be made; true by default."""


_Converted: Any = create_model("_Converted", __base__=Part, **_fields_of(conversion.Conversion, SETTINGS))


class Settings(_Converted):
    """What a job is made of. The more specific place wins: defaults, then the matrix, then the source."""

    method: Method = UNSET
    """The conversion; rmsnorm by default."""
    options: Options = UNSET  # type: ignore[valid-type]
    """What the conversion is allowed to do."""
    limits: Limits = UNSET  # type: ignore[valid-type]
    """Limits on the figures of the verification."""
    resources: ResourcesPart = UNSET
    """What the job needs."""
    upload: UploadPart = UNSET
    """Upload to the hub, off by default."""


class Variant(Settings):
    """An entry of the matrix: settings that every source is converted with once more."""

    name: str = UNSET
    """What ``{variant}`` stands for; the method by default."""


KINDS = ("source", "folder", "author")


class Source(Settings):
    """What is converted: exactly one of ``source``, ``folder`` and ``author``, and settings for it."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [{"required": [kind]} for kind in KINDS]})

    source: str = UNSET
    """Hub id (name, org/name, @revision), folder, weight file (with arch), or demo:NAME."""
    folder: str = UNSET
    """A pattern of local folders, such as ``checkpoints/*``; ``**`` goes through subfolders. Folders without a
    checkpoint, and outputs of normconvert, are passed over."""
    author: str = UNSET
    """An author on the hub; ``models`` says which models."""
    models: Patterns = UNSET
    """With author: patterns of model names, such as ``pythia-*``; all by default."""
    exclude: Patterns = UNSET
    """With author or folder: patterns of names to leave out."""
    revision: str = UNSET
    """Branch, tag or commit on the hub."""
    arch: str = UNSET
    """``timm:NAME``, the architecture of weights without a config.json."""
    variant: str = UNSET
    """Of the weights in a folder or on the hub: ``fp16`` for ``model.fp16.safetensors``."""
    weights: Literal[conversion.SETS] = UNSET  # type: ignore[valid-type]
    """Of a checkpoint of training: the averaged or the trained ones; by default the averaged, if there are any."""
    name: str = UNSET
    """With source: what ``{name}`` stands for, instead of the last part of the source."""
    output: str = UNSET
    """The output's name, instead of the recipe's."""

    @model_validator(mode="after")
    def _one_kind(self) -> Source:
        given = [kind for kind in KINDS if kind in self.model_fields_set]
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            raise ValueError(f"expected one of {', '.join(KINDS)}, found {found}")
        alone = {"models": ("author",), "exclude": ("author", "folder"), "name": ("source",)}
        for key, kinds in alone.items():
            if key in self.model_fields_set and given[0] not in kinds:
                raise ValueError(f"{key} goes with {' or '.join(kinds)}, found {given[0]}")
        if {"revision", "folder"} <= self.model_fields_set:
            raise ValueError("revision is for models on the hub, found folder")
        return self


def _source_of_text(value: Any) -> Any:
    return {"source": value} if isinstance(value, str) else value


def _variant_of_text(value: Any) -> Any:
    return {"method": value} if isinstance(value, str) else value


AnySource = Annotated[Source, BeforeValidator(_source_of_text, json_schema_input_type=str | Source)]
AnyVariant = Annotated[Variant, BeforeValidator(_variant_of_text, json_schema_input_type=Method | Variant)]


class Recipe(Part):
    """A recipe of normconvert: many conversions in one file."""

    description: str = UNSET
    """For people."""
    defaults: Settings = Settings()
    """Settings of every job."""
    sources: Annotated[tuple[AnySource, ...], Field(min_length=1)]
    """What is converted: references, or entries with settings of their own."""
    matrix: Annotated[tuple[AnyVariant, ...], Field(min_length=1)] = UNSET
    """Every source is converted once for each entry: a method, or settings. Without it, once."""
    output: str = OUTPUT
    """The output of a job: a folder, relative to where the command runs, or an fsspec URL (s3://, gs://). It may hold
    ``{name}`` (of the source), ``{variant}``, ``{method}``, ``{author}`` (on the hub), ``{dtype}`` and ``{recipe}``
    (this file's name)."""


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe (draft 2020-12)."""
    schema = Recipe.model_json_schema()
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "normconvert recipe"}
    return head | {key: value for key, value in _tidy(schema).items() if key not in head}


def _tidy(schema: Any) -> Any:
    """Without the titles that only repeat names, and without defaults that only say "not there"."""
    if isinstance(schema, list):
        return [_tidy(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: {name: _tidy(part) for name, part in value.items()} if key in ("properties", "$defs") else _tidy(value)
        for key, value in schema.items()
        if not (key == "title" and isinstance(value, str)) and (key, value) != ("default", None)
    }


def keys_at(location: Iterable[str | int]) -> list[str]:
    """The keys that a recipe may have at a place, e.g. ``("sources", 0, "options")``."""
    part: type[BaseModel] = Recipe
    for key in location:
        inner = part if isinstance(key, int) else _model_in(part.model_fields[key].annotation)
        if inner is None:
            return []
        part = inner
    return list(part.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model inside an annotation such as ``tuple[Source, ...] | None``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for inner in get_args(annotation) if (found := _model_in(inner))), None)
