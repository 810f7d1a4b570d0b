"""From checked recipes to jobs: sources x matrix, with every setting filled in and every output named.

Everything that is wrong with the batch as a whole is found here, before anything runs, and told at once.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from string import Formatter
from typing import Any

from normconvert.errors import InputError
from normconvert.files.yaml_file import Key, nearest
from normconvert.option_fields import about
from normconvert.options import Conversion, Options
from normconvert.recipes.job import Job, Resources, Upload
from normconvert.recipes.model import SETTINGS, Settings, Source, Variant
from normconvert.recipes.origins import Origin, Reference, hub_models, local_checkpoints, look_up
from normconvert.recipes.reading import RecipeFile, together
from normconvert.recipes.storage import is_url
from normconvert.sources import hub

PLACEHOLDERS = ("name", "variant", "method", "author", "dtype", "recipe")
DEFAULTS: Mapping[str, Any] = {
    **{name: default for name, default, _ in about(Conversion) if name in ("method", *SETTINGS)},
    "options": {}, "limits": {}, "resources": {}, "upload": {},
}  # fmt: skip
"""What a recipe need not say."""


@dataclass(frozen=True)
class ResolvedEntry:
    """An entry of a recipe's sources, with its patterns resolved to one reference."""

    recipe: RecipeFile
    said: Source
    key: Key
    reference: Reference

    @property
    def where(self) -> str:
        """The entry's place."""
        return self.recipe.where(self.key)


def expand(recipes: Iterable[RecipeFile]) -> list[Job]:
    """The jobs of several recipes, in their order.

    Raises:
        InputError: sources are missing, outputs clash, or a name cannot be filled in: one line for each.
    """
    problems: list[InputError] = []
    entries = [entry for recipe in recipes for entry in _resolved_entries(recipe, problems)]
    origins = look_up(entry.reference for entry in entries)
    missing = dict.fromkeys(
        f"{entry.where}: {origins[entry.reference]}"
        for entry in entries
        if isinstance(origins[entry.reference], InputError)
    )
    problems += [InputError(line) for line in missing]
    if problems:
        raise _missing(problems)
    jobs: list[Job] = []
    for entry in entries:
        origin = origins[entry.reference]
        assert isinstance(origin, Origin)
        variants = entry.recipe.recipe.matrix or (None,)
        for variant in variants:
            try:
                jobs.append(_job(entry, origin, variant))
            except InputError as error:
                problems.append(error)
    problems += clashes(jobs)
    if problems:
        raise together(problems)
    return jobs


def _missing(problems: list[InputError]) -> InputError:
    if len(problems) == 1:
        return problems[0]
    return InputError("\n  ".join([f"{len(problems)} sources cannot be had; nothing was run:", *map(str, problems)]))


def _resolved_entries(recipe: RecipeFile, problems: list[InputError]) -> list[ResolvedEntry]:
    entries = []
    for index, entry in enumerate(recipe.recipe.sources):
        key = ("sources", index)
        try:
            texts = _resolve(entry)
        except InputError as error:
            problems.append(recipe.file.error(key, str(error)))
            continue
        entries += [
            ResolvedEntry(recipe, entry, key, Reference(text, entry.revision, entry.arch, entry.variant))
            for text in texts
        ]
    return entries


def _resolve(entry: Source) -> list[str]:
    exclude = entry.exclude or ()
    if entry.folder:
        return local_checkpoints(entry.folder, entry.arch, exclude)
    if entry.author:
        return hub_models(entry.author, entry.models or ("*",), exclude)
    return [entry.source]


def _job(entry: ResolvedEntry, origin: Origin, variant: Variant | None) -> Job:
    parts = [entry.recipe.recipe.defaults, *([variant] if variant is not None else []), entry.said]
    said = merge(parts)
    if said["limits"] and not said["verify"]:
        raise entry.recipe.file.error(
            entry.key, "limits are held against the verification, which verify: false leaves out"
        )
    name = entry.said.name or origin.name
    label = (variant.name if variant is not None and "name" in variant.model_fields_set else None) or said["method"]
    words = {
        "name": name, "variant": label, "method": said["method"], "author": origin.author, "dtype": said["dtype"],
        "recipe": entry.recipe.name,
    }  # fmt: skip
    key: Key = (*entry.key, "output") if entry.said.output is not None else ("output",)
    output = _fill(entry.recipe, key, entry.said.output or entry.recipe.recipe.output, words)
    resources = Resources(
        cpus=said["resources"].get("cpus", 1.0),
        gpus=said["resources"].get("gpus", 1.0 if str(said["device"]).startswith("cuda") else 0.0),
        memory=said["resources"].get("memory", origin.memory(said["verify"])),
    )
    return Job(
        source=origin.source, name=name, variant=label, output=_place(output), where=entry.where,
        method=said["method"], options={**asdict(Options()), **said["options"]}, revision=origin.commit,
        branch=origin.branch, arch=entry.said.arch, files=entry.said.variant, weights=entry.said.weights,
        dtype=said["dtype"], max_shard_size=said["max_shard_size"],
        require_all=said["require_all"], trust_remote_code=said["trust_remote_code"], verify=said["verify"],
        device=said["device"], limits=said["limits"], resources=resources, upload=_upload(entry, said["upload"], words),
        size=origin.size,
    )  # fmt: skip


def merge(parts: Iterable[Settings]) -> dict[str, Any]:
    """All settings, later parts winning key by key over earlier ones and those over the defaults."""
    merged: dict[str, Any] = dict(DEFAULTS)
    for part in parts:
        said = part.model_dump(exclude_unset=True, include=set(DEFAULTS))
        merged |= {k: {**merged[k], **v} if isinstance(v, dict) else v for k, v in said.items()}
    return merged


def _upload(entry: ResolvedEntry, said: Mapping[str, Any], words: Mapping[str, str]) -> Upload | None:
    if not said.get("enabled"):
        return None
    if not said.get("repo"):
        raise entry.recipe.file.error(entry.key, "upload is enabled without a repo: give upload: {repo: me/{name}}")
    repo = _fill(entry.recipe, entry.key, said["repo"], words)
    if not hub.HUB_ID.fullmatch(repo):
        raise entry.recipe.file.error(entry.key, f"upload to {repo!r}: not a hub id (name or org/name)")
    return Upload(repo, said.get("private", True))


def _fill(recipe: RecipeFile, key: Key, template: str, words: Mapping[str, str]) -> str:
    """A name with its placeholders filled in; nothing of Python's formatting but ``{name}``, ``{{`` and ``}}``."""
    try:
        pieces = list(Formatter().parse(template))
    except ValueError as error:
        raise recipe.file.error(key, f"{template!r}: {error}; write {{{{ and }}}} for braces") from None
    filled = ""
    for text, name, spec, conversion in pieces:
        filled += text
        if name is None:
            continue
        if name not in words or spec or conversion:
            raise recipe.file.error(key, f"{template!r}: unknown placeholder {{{name}}}{nearest(name, PLACEHOLDERS)}")
        word = words[name]
        # A name is one part of a path: what it stands for may come from anywhere.
        if word in ("", ".", "..") or "/" in word or "\\" in word or not word.isprintable():
            raise recipe.file.error(key, f"{template!r}: {{{name}}} is {word!r}, which is no name: give one")
        filled += words[name]
    return filled


def _place(output: str) -> str:
    """An absolute folder or a URL."""
    if is_url(output):
        return output.rstrip("/")
    return os.path.abspath(os.path.expanduser(output))


def clashes(jobs: Iterable[Job]) -> list[InputError]:
    """Outputs that two jobs share, that lie inside each other, or that touch a source."""
    jobs = list(jobs)
    problems = []
    owner: dict[str, Job] = {}
    for job in jobs:
        place = _canonical(job.output)
        if place in owner:
            problems.append(
                InputError(
                    f"{job.where}: two jobs with one output {shown(job.output)}: {job.label} and {owner[place].label} "
                    f"({owner[place].where}); tell them apart by {{name}}, {{author}} or {{variant}} in output"
                )
            )
        owner.setdefault(place, job)
    for place, job in owner.items():
        outer = next((owner[above] for above in _above(place) if above in owner), None)
        if outer is not None:
            problems.append(
                InputError(f"{job.where}: the output {shown(job.output)} lies inside another, {shown(outer.output)}")
            )
    sources = {_canonical(job.source): job for job in jobs if os.path.isabs(job.source)}
    for source, reader in sources.items():
        touched = next((owner[place] for place in (source, *_above(source)) if place in owner), None)
        if touched is not None:
            problems.append(
                InputError(
                    f"{touched.where}: the output {shown(touched.output)} would replace a source of the batch, "
                    f"{shown(reader.source)}"
                )
            )
    for place, job in owner.items():
        inside = next((sources[above] for above in _above(place) if above in sources), None)
        if inside is not None and os.path.isdir(inside.source):
            problems.append(
                InputError(f"{job.where}: the output {shown(job.output)} lies inside the source {shown(inside.source)}")
            )
    return problems


def _canonical(place: str) -> str:
    return place if is_url(place) else os.path.realpath(place)


def _above(place: str) -> list[str]:
    if is_url(place):
        scheme, _, rest = place.partition("://")
        parts = rest.split("/")
        return [f"{scheme}://{'/'.join(parts[:n])}" for n in range(len(parts) - 1, 0, -1)]
    return [str(parent) for parent in Path(place).parents]


def shown(place: str) -> str:
    """A path as the user would write it here: relative if it is below the working directory."""
    if not os.path.isabs(place):
        return place
    relative = os.path.relpath(place)
    return place if relative.startswith("..") else relative


def with_run(jobs: Iterable[Job], run: str, redo: bool) -> list[Job]:
    """The jobs as parts of one batch."""
    return [replace(job, run=run, redo=redo) for job in jobs]
