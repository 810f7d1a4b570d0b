"""Reading what an earlier conversion wrote about itself into its output folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from normconvert.errors import InputError
from normconvert.plan.conversion_plan import FORMAT

RECORD_FILE = "normconvert.json"


def structural_edits(folder: Path) -> tuple[dict[str, Any], ...]:
    """The module edits of a converted folder, if its weights fit the architecture only with them applied.

    Raises:
        InputError: the record cannot be read.
    """
    from normconvert.runtime import STRUCTURAL

    try:
        modules = read_record(folder)["modules"]
    except InputError:  # no record, or none that can be read: then the plain architecture has to fit
        return ()
    return tuple(modules) if any(edit.get("op") in STRUCTURAL for edit in modules) else ()


class NotConverted(InputError):
    """The folder has no record of a conversion."""


def read_record(folder: Path) -> dict[str, Any]:
    """``library``, ``architecture`` and ``modules`` of a converted folder, from its record or else its config.json.

    Raises:
        InputError: there is no record, or one that this version cannot read.
    """
    # save_pretrained of a converted model keeps its config and not the record.
    for name in (RECORD_FILE, "config.json"):
        if not (folder / name).is_file():
            continue
        try:
            data = json.loads((folder / name).read_text(encoding="utf-8"))
            if name == "config.json":
                data = {**data["normconvert"], "library": "transformers"}
            if data["format"] != FORMAT:
                raise InputError(
                    f"{folder / name}: format {data['format']!r}, expected {FORMAT}: use the normconvert that wrote it"
                )
            # Those of all conversions, where there was more than one; else those of the plan.
            modules = data["modules"] if "modules" in data else data["plan"]["modules"]
            return {"library": data["library"], "architecture": data["architecture"], "modules": modules}
        except (ValueError, TypeError, KeyError) as error:
            # Without our key a config.json is an ordinary one, and no error.
            if name == RECORD_FILE:
                raise InputError(f"{folder / name}: not a conversion record ({error!r}): convert again") from error
    raise NotConverted(
        f"{folder}: not converted by normconvert (no {RECORD_FILE}): load it with transformers or timm, "
        "or convert it first with `normconvert rmsnorm`"
    )
