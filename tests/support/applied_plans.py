"""A plan applied to a checkpoint, without a proof and without a verification."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from normconvert.apply.checkpoint import ApplyResult, write_checkpoint
from normconvert.apply.output_folder import staged_output
from normconvert.plan.conversion_plan import Plan
from normconvert.sources import Source


def apply_plan(source: Source, plan: Plan, out: Path, *, overwrite: bool = False, **options: Any) -> ApplyResult:
    """Write the converted checkpoint to ``out``, complete or not at all; ``options`` are those of write_checkpoint."""
    with staged_output(out, source.folder or source.files[0], overwrite) as folder:
        return write_checkpoint(source, plan, folder, **options)
