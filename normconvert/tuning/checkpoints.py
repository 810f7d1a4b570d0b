"""The state of a run on disk: the last good one stays, whatever happens while the next is being written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from normconvert.errors import InputError, first_line
from normconvert.tuning.settings import Settings

STATE, SETTINGS = "state.pt", "settings.json"


def training_folder(out: Path) -> Path:
    """Where the state of a run lies that will end in ``out``."""
    return out.parent / f"{out.name}.training"


def save(folder: Path, settings: Settings, state: Mapping[str, Any]) -> None:
    """Write a state beside the last one, and then in its place.

    Args:
        folder: of the run; made if it is not there.
        settings: to be compared when the run is resumed.
        state: tensors, numbers and strings, in dictionaries and lists.

    Raises:
        InputError: it cannot be written (a full disk, say); the last state is still there.
    """
    new = folder / f".{STATE}.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # First: a state is never there without the settings that it must be resumed with.
        (folder / SETTINGS).write_text(json.dumps(settings.to_json(), indent=1) + "\n", encoding="utf-8")
        with new.open("wb") as file:
            torch.save(dict(state), file)
            file.flush()
            # Renamed only once its bytes are on the disk: a power cut leaves the last state or this one, not half of
            # one.
            os.fsync(file.fileno())
        os.replace(new, folder / STATE)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        with suppress(OSError):
            new.unlink()
        kept = f"the last one is kept: go on with --resume ({folder})" if (folder / STATE).is_file() else "none is kept"
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError(f"{folder}: the state of the training cannot be written: {reason}; {kept}") from error


def check(folder: Path, settings: Settings, resume: bool) -> None:
    """Refuse to start over a run that was not finished, or to go on with another one.

    Raises:
        InputError: see above; other settings are listed.
    """
    exists = (folder / STATE).is_file()
    if exists and not resume:
        raise InputError(f"{folder}: a training that was not finished: pass --resume to go on, or remove the folder")
    if not resume:
        return
    if not exists:
        raise InputError(f"{folder}: nothing to resume: no training was interrupted there")
    try:
        before = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / SETTINGS}: cannot be read: {error}") from error
    differences = settings.differences(before)
    if differences:
        raise InputError("cannot resume with other settings:" + "".join(f"\n  {d}" for d in differences))


def load(folder: Path) -> dict[str, Any]:
    """The state of a run.

    Raises:
        InputError: the file is damaged.
    """
    try:
        state: dict[str, Any] = torch.load(folder / STATE, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        reason = first_line(error)[:200]
        raise InputError(f"{folder / STATE}: cannot be read ({reason}): remove the folder and start again") from error
    return state


def remove(folder: Path) -> None:
    """The run is finished."""
    shutil.rmtree(folder, ignore_errors=True)
