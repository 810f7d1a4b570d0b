"""What the conversion of an adapter is asked: its options, each defined once. Nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import KW_ONLY, MISSING, dataclass
from pathlib import Path

from normconvert.option_fields import option
from normconvert.options import GIVEN, OUT, OVERWRITE, SOURCE, TRUST, WRITTEN


@dataclass(frozen=True)
class AdapterConversion:
    """What :func:`normconvert.convert_adapter` is asked."""

    adapter: str | Path = option(MISSING, "Folder of a PEFT adapter of the original.", metavar="ADAPTER")
    out: Path | str = option(MISSING, OUT, metavar="OUT")
    converted: str | Path = option(
        MISSING, "Output folder of the conversion that the adapter is for.", formerly=("--for",),
        metavar="CONVERTED", required=True,
    )  # fmt: skip
    _: KW_ONLY
    source: str | Path | None = option(
        None, "What was converted; needed where that was a local folder or file.", metavar="SRC"
    )
    rotation: str | None = option(None, GIVEN, metavar="FILE")
    overwrite: bool = option(False, OVERWRITE, panel=WRITTEN)
    trust_remote_code: bool = option(False, TRUST, panel=SOURCE)
