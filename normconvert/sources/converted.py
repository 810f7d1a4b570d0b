"""Converted checkpoints: loading them, and the files that let transformers load them by itself.

``OUT/normconvert.json`` is the record of a conversion; of its keys the loader reads ``format`` (1), ``library``,
``architecture`` and ``plan`` (:meth:`normconvert.plan.conversion_plan.Plan.to_json`). transformers outputs carry the
module edits in ``config.json`` too, under ``normconvert``, where the shipped ``modeling_normconvert.py`` finds them and
where ``save_pretrained`` keeps them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normconvert.errors import InputError
from normconvert.files.code_references import without_code
from normconvert.files.user_paths import user_path
from normconvert.plan.conversion_plan import FORMAT, Plan, edited_config
from normconvert.plan.conversion_record import RECORD_FILE, NotConverted, read_record, recorded_changes
from normconvert.sources.families import family

if TYPE_CHECKING:
    import torch
    from torch import nn

    from normconvert.sources.source import Source


def load(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
    arch: str | None = None,
) -> nn.Module:
    """Load a converted checkpoint with its RMSNorms in place, in eval mode; transformers and timm alike.

    Args:
        path: the output folder of a conversion, a folder written by ``save_pretrained`` of such a model, or a hub id.
        dtype: dtype of all floating parameters; None: that of the files.
        device: where to put the model.
        trust_remote_code: allow code that came with the *original* checkpoint to run.
        arch: ``FILE.py:FACTORY`` that makes the model, if the original was converted with such.

    Returns:
        The architecture's own class (for transformers a subclass of the same name, so that ``save_pretrained`` writes
        a converted checkpoint again).

    Raises:
        InputError: there is no conversion record, or the files are unfit for the architecture.
    """
    folder = user_path(path)
    if folder.is_dir():
        read_record(folder)
    source = open_any(path, trust_remote_code=trust_remote_code, arch=arch)
    # Of the folder that was opened: what came from the hub is in its cache only now.
    read_record(source.folder or folder)
    return load_opened(source, dtype=dtype, device=device)


def open_any(path: str | Path, *, arch: str | None = None, **opening: Any) -> Source:
    """A checkpoint, converted or not; the record of a timm model without a config.json says which it is.

    Args:
        path: a reference, as of the commands' SRC.
        arch: architecture of bare weights.
        opening: further arguments of :func:`normconvert.sources.open_source`.

    Raises:
        InputError: see :func:`normconvert.sources.open_source`.
    """
    from normconvert.sources import open_source

    folder = user_path(path)
    if arch is None and (folder / RECORD_FILE).is_file() and not (folder / "config.json").is_file():
        record = read_record(folder)
        arch = f"timm:{record['architecture']}" if record["library"] == "timm" else None
    return open_source(str(path), arch=arch, **opening)


def load_opened(source: Source, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> nn.Module:
    """The model of a source that is open: as :func:`load` where it was converted, else as its library loads it.

    Raises:
        InputError: as :func:`load`, but for the record.
    """
    from normconvert.runtime import REMOTE_FILE, apply_module_edits, converted_class

    edits = recorded_edits(source)
    model = source.load(dtype=dtype, device=device)
    if edits is None or source.folder is None:
        return model
    _refuse_trained(source, source.folder, model)
    try:
        # What the weights do not fit without has been applied while they were loaded.
        apply_module_edits(model, () if source.modules else edits)
    except ValueError as error:
        raise InputError(f"{source.reference}: {error}") from error
    # The class that the shipped file makes, so that save_pretrained writes the edits and the file again.
    auto_map = source.config.get("auto_map") or {}
    if not source.modules and any(str(entry).startswith(f"{Path(REMOTE_FILE).stem}.") for entry in auto_map.values()):
        model.__class__ = converted_class(type(model))
    return model


def recorded_edits(source: Source) -> Sequence[Mapping[str, Any]] | None:
    """The module edits that a converted folder records; None if it was not converted.

    Raises:
        InputError: the record is of another model, or cannot be read.
    """
    if source.folder is None:
        return None
    try:
        record = read_record(source.folder)
    except NotConverted:
        return None
    # The edits name modules of the recorded class; in another they might find modules of the same name.
    if record["architecture"] != source.architecture:
        raise InputError(
            f"{source.reference}: the record is of a {record['architecture']}, not of a {source.architecture}: "
            "convert again"
        )
    edits: Sequence[Mapping[str, Any]] = record["modules"]
    return edits


def _refuse_trained(source: Source, folder: Path, model: nn.Module) -> None:
    """Refuse a folder that the plain architecture has trained and saved: its norms subtract a mean that is there again.

    That class writes config.json as it found it, and neither the record nor the file that the config speaks of.

    Raises:
        InputError: it was trained, or nobody can tell.
    """
    import torch

    from normconvert.plan.edits import apply_edits
    from normconvert.runtime import CONFIG_KEY, REMOTE_FILE

    path, section, auto_map = source.reference, source.config.get(CONFIG_KEY), source.config.get("auto_map") or {}
    ours = any(str(target).startswith(f"{Path(REMOTE_FILE).stem}.") for target in auto_map.values())
    written = any((folder / name).is_file() for name in (RECORD_FILE, REMOTE_FILE))
    if not isinstance(section, dict) or not ours or written:
        return
    if section.get("changed") is None:
        raise InputError(f"{path}: saved by the original architecture, by which nobody can tell: convert it again")
    state = model.state_dict()
    file = folder / "config.json"
    for name, rows in recorded_changes(file, section).items():
        try:
            value = state[name].double()
            distance = (apply_edits(value, rows, state.__getitem__) - value).abs().max()
        except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
            raise InputError(f"{file}: what it says of {name!r} does not fit the model: convert again") from error
        # A mean that was removed before rounding comes back as half a unit of the largest element at most, in the dtype
        # of the files or in the one that was asked for.
        eps = max(torch.finfo(kind).eps for kind in (source.dtype, state[name].dtype))
        if distance > eps * value.abs().max():
            raise InputError(
                f"{path}: trained and saved as the original architecture since it was converted ({name} has a mean "
                "again): load it with transformers, without trust_remote_code, and convert what that saves without "
                f"`auto_map` and `{CONFIG_KEY}` in its config.json"
            )


def huggingface_files(
    config: dict[str, Any], plan: Plan, architecture: str, *, own_code: bool = False
) -> dict[str, str | bytes]:
    """The files that make a transformers output load by ``trust_remote_code``, and still without it.

    Args:
        config: the source's config.json; not changed.
        plan: the plan that was applied.
        architecture: the class of the source.
        own_code: that class is code that comes with the checkpoint.

    Returns:
        File name -> content: ``config.json`` with the plan's config changes, the module edits and an ``auto_map``, and
        ``modeling_normconvert.py``, and no other code. A checkpoint whose model is code of its own keeps its
        ``auto_map`` and gains no file.
    """
    from normconvert.runtime import CONFIG_KEY, REMOTE_FILE, shipped_source

    config = edited_config(config, plan.config)
    guard = plan.guard or (config.get(CONFIG_KEY) or {}).get("guard")  # the source's own, if it has one
    # What is decided by the tensors' names (:mod:`normconvert.sources.unnamed_class`) cannot be told by those written.
    if not config.get("architectures"):
        config["architectures"] = [architecture]
    config[CONFIG_KEY] = {"format": FORMAT, "architecture": architecture, "modules": plan.modules}
    if plan.method == "rmsnorm":
        kept = {name: [row for row in rows if row["op"] in ("center", "fill")] for name, rows in plan.tensors.items()}
        config[CONFIG_KEY]["changed"] = {name: rows for name, rows in kept.items() if rows}
    if plan.classes:
        config[CONFIG_KEY]["classes"] = plan.classes
    if own_code:
        config[CONFIG_KEY]["own_code"] = True
    if guard is not None:
        config[CONFIG_KEY]["guard"] = guard
    module = Path(REMOTE_FILE).stem
    files: dict[str, str | bytes] = {}
    # Two kinds of code cannot stand behind one auto_map: that of the checkpoint stays where it is the model itself.
    if not own_code:
        config = without_code(config)
        auto_map = dict(config.get("auto_map") or {})
        classes = _auto_classes(str(config.get("model_type")), architecture, plan)
        if any(edit["op"] == "resize" for edit in plan.modules):  # for other classes of the family it does not load
            classes = {auto: name for auto, name in classes.items() if name == architecture}
        classes = classes or {"AutoModel": architecture}
        config["auto_map"] = auto_map | {auto: f"{module}.{name}" for auto, name in classes.items()}
        files[REMOTE_FILE] = shipped_source()
    files["config.json"] = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    return files


def _auto_classes(model_type: str, architecture: str, plan: Plan) -> dict[str, str]:
    """The Auto classes that lead to the shipped file -> the class that they build.

    Those that are not proved are among them: the shipped class refuses them, where the library's own would be wrong
    without a word.
    """
    others = {*plan.classes, *plan.shifted_classes}
    found: dict[str, str] = {}
    for name, autos in family(model_type).items():
        for auto in autos:
            if auto.startswith("AutoModel") and name == architecture:
                found[auto] = name
            elif auto == "AutoModel" or (name in others and auto not in found):
                found.setdefault(auto, name)
    return found
