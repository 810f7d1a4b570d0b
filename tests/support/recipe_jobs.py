"""Jobs of recipes, planned and performed in this process."""

from __future__ import annotations

import uuid
from dataclasses import replace
from pathlib import Path

from normconvert.recipes import work
from normconvert.recipes.expansion import expand
from normconvert.recipes.job import Job, Result
from normconvert.recipes.reading import read_recipe


def job_of(text: str = "sources: [model]\n", *, redo: bool = False) -> Job:
    Path("r.yaml").write_text(text)
    (job,) = expand([read_recipe("r.yaml")])
    return replace(job, redo=redo)


def perform(job: Job, run: str = "") -> Result:
    """The job in a batch of its own, or in one that is named."""
    return work.perform(replace(job, run=run or uuid.uuid4().hex), lambda kind, data: None)


def look(folder: Path) -> dict[str, tuple[int, int]]:
    """What shows whether any file was written again, but for the state, which notes when it looked."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and ".cache" not in p.parts]
    return {str(p): (p.stat().st_ino, p.stat().st_mtime_ns) for p in files}
