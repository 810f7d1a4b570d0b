"""Reading what an earlier conversion wrote about itself into its output folder: somebody else's data, until checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from normconvert.errors import InputError, first_line
from normconvert.files.weight_files import inside, load_json
from normconvert.plan.conversion_plan import FORMAT, Plan

RECORD_FILE = "normconvert.json"
_STRICT = ConfigDict(strict=True, extra="allow", protected_namespaces=())


class _Edits(BaseModel):
    model_config = _STRICT
    modules: list[dict[str, Any]]


class _Converted(_Edits):
    """What a config.json says of its conversion."""

    architecture: str


class _Change(BaseModel):
    """What was done to a tensor that training may have undone."""

    model_config = _STRICT
    op: Literal["center", "fill"]
    axis: int | None = None
    outer: int = Field(1, ge=1)
    inner: int = Field(1, ge=1)
    value: float | None = None


class _Changes(BaseModel):
    model_config = _STRICT
    changed: dict[str, list[_Change]]


class _Source(BaseModel):
    model_config = _STRICT
    reference: str
    revision: str | None = None
    sha256: dict[str, str] | None = None


class _Record(BaseModel):
    """A record, as far as it is relied upon."""

    model_config = _STRICT
    library: Literal["transformers", "timm", "torch"]
    architecture: str
    plan: _Edits
    modules: list[dict[str, Any]] | None = None


class _Whole(_Record):
    """A record from which the conversion can be made again."""

    normconvert: str = ""
    method: str
    source: _Source
    options: dict[str, bool | int | str | None]
    versions: dict[str, str]
    verification: dict[str, Any] | None = None


def recorded_changes(file: Path, section: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """What a config.json says was done to its tensors, by name; rows of a plan.

    Raises:
        InputError: no such data.
    """
    return {
        name: [row.model_dump() for row in rows] for name, rows in _checked(file, section, _Changes).changed.items()
    }


def structural_edits(folder: Path) -> tuple[dict[str, Any], ...]:
    """The module edits of a converted folder, if its weights fit the architecture only with them applied.

    Raises:
        InputError: the record cannot be read.
    """
    try:
        modules = read_record(folder)["modules"]
    except InputError:  # no record, or none that can be read: then the plain architecture has to fit
        return ()
    return () if fit_alone(modules) else tuple(modules)


def fit_alone(modules: Sequence[Mapping[str, Any]]) -> bool:
    """Whether weights fit the library's own class without these module edits."""
    from normconvert.runtime import STRUCTURAL  # torch comes with it, and to find a record takes none

    # Where the config cannot say a norm's new eps, the weights fit the class with that alone.
    unstated = (edit["op"] in ("epsilon", "renew") and not edit.get("stated") for edit in modules)
    return not any(unstated) and not any(edit["op"] in STRUCTURAL for edit in modules)


class NotConverted(InputError):
    """The folder has no record of a conversion."""


def read_record(folder: Path) -> dict[str, Any]:
    """``library``, ``architecture`` and ``modules`` of a converted folder, from its record or else its config.json.

    Raises:
        InputError: there is no record, or one that this version cannot read.
    """
    if (folder / RECORD_FILE).is_file():
        file = inside(folder, RECORD_FILE)
        data = load_json(file)
        record = _checked(file, data, _Record)
        # Those of all conversions, where there was more than one; else those of the plan.
        modules = record.plan.modules if record.modules is None else record.modules
        library, architecture = record.library, record.architecture
    # save_pretrained of a converted model keeps its config and not the record.
    elif (folder / "config.json").is_file() and "normconvert" in (config := load_json(inside(folder, "config.json"))):
        file, library = folder / "config.json", "transformers"
        section = _checked(file, config["normconvert"], _Converted)
        modules, architecture = section.modules, section.architecture
    else:
        raise NotConverted(
            f"{folder}: not converted by normconvert (no {RECORD_FILE}): load it with transformers or timm, "
            "or convert it first with `normconvert rmsnorm`"
        )
    from normconvert.runtime import check_module_edits  # as above

    try:
        check_module_edits(modules)
    except ValueError as error:
        raise InputError(f"{file}: not a conversion record ({error}): convert again") from error
    return {"library": library, "architecture": architecture, "modules": modules}


def read_whole_record(folder: Path) -> dict[str, Any]:
    """The whole record of a conversion, of the right types; what it says is true or not.

    Raises:
        InputError: there is none, or one that this version cannot read.
    """
    file = folder / RECORD_FILE
    if not file.is_file():
        what = "no such folder" if not folder.is_dir() else f"not converted by normconvert (no {RECORD_FILE})"
        raise NotConverted(f"{folder}: {what}: nothing to check")
    data = load_json(inside(folder, RECORD_FILE))
    _checked(file, data, _Whole)
    from normconvert.runtime import check_module_edits  # as above

    try:
        Plan.from_json(data["plan"])
        check_module_edits(data.get("modules") or data["plan"]["modules"])
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not a conversion record ({first_line(error)}): convert again") from error
    return data


def _checked(file: Path, data: Any, model: Any) -> Any:
    """``data`` as a model.

    Raises:
        InputError: it is of another format, or not such data.
    """
    if not isinstance(data, dict) or "format" not in data:
        raise InputError(f"{file}: not a conversion record (no format): convert again")
    if data["format"] != FORMAT:
        raise InputError(
            f"{file}: format {str(data['format'])[:40]!r}, expected {FORMAT}: use the normconvert that wrote it"
        )
    try:
        return model.model_validate(data)
    except (ValidationError, RecursionError) as error:
        first = error.errors(include_url=False)[0] if isinstance(error, ValidationError) else {"loc": (), "msg": "deep"}
        place = ".".join(map(str, first["loc"]))
        raise InputError(f"{file}: not a conversion record ({place}: {first['msg']}): convert again") from error
