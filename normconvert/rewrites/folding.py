"""fold: every norm's weight and bias move into the linear maps that read it, and leave ones and zeros.

W (g * n + b) + c = (W diag(g)) n + (W b + c), for LayerNorm and RMSNorm alike, whatever stream they read: names and
shapes stay, and the library's own class computes the same. Where a reader has no bias for the norm's, an output head
say, that stays as b / g (`moved_norms`).
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

from normconvert.analysis.norms import Norm, by_path, find_norms
from normconvert.analysis.streams import Analysis, AxisRef, Stream
from normconvert.errors import InputError
from normconvert.options import Options
from normconvert.plan.conversion_plan import Plan, Verdict
from normconvert.rewrites.moved_norms import Moved, doors_behind, move, moved_norm, tables_to_untie, untie
from normconvert.rewrites.readers import Unfoldable
from normconvert.rewrites.registry import rewrite
from normconvert.rewrites.verdicts import Obstacle, misuse, never_called
from normconvert.rewrites.writers import Edits
from normconvert.tracing.graph import Graph

CASTS = "the model casts to float32 on the way to its norms, so float32's rounding limits the algebra's test"


@rewrite("fold", compared="verification")
def plan_fold(graph: Graph, options: Options) -> Plan:
    """The plan that moves the weight and bias of every norm which linear maps alone read into those.

    Every norm gets a verdict.

    Raises:
        InputError: `--keep` names what is not there.
    """
    _check_kept(graph, options.keep)
    norms = find_norms(graph, uncentred=True)
    analysis = Analysis(graph, norms)
    tied = tables_to_untie(analysis)
    untied = {name: head for name, (_, head) in tied.items()}
    calls = by_path(norms)
    verdicts: list[Verdict] = []
    folded: list[Moved] = []
    for path, group in calls.items():
        found = _moved(analysis, path, group, untied, options)
        if isinstance(found, Moved):
            folded.append(found)
            stays = " Its bias stays, divided by the weight: one of them has none." if found.bias_stays else ""
            reason = f"its weight and bias move into the linear maps that read it.{stays}"
            verdicts.append(Verdict(path, group[0].kind, True, reason, "converted"))
        else:
            verdicts.append(Verdict(path, group[0].kind, False, found.reason, found.code))
    tensors: Edits = {}
    config: dict[str, Any] = {}
    notes = untie(graph, tied.values(), folded, tensors, config)
    for moved in folded:
        move(graph, moved, tensors)
    float32 = any(norm.float32 for moved in folded for norm in moved.calls)
    return Plan(
        "fold",
        tensors=tensors,
        config=config,
        verdicts=verdicts + never_called(graph, set(calls)),
        notes=notes + ([CASTS] if float32 else []),
        float32_norms=float32,
        shifted_doors=doors_behind(graph, folded),
    )


def _moved(
    analysis: Analysis, path: str, group: list[Norm], untied: dict[str, str], options: Options
) -> Moved | Obstacle:
    """Where a norm's weight and bias go, or why they stay."""
    where: dict[Norm, tuple[Stream, AxisRef]] = {n: (s, r) for s in analysis.streams for n, r in s.norms}
    for norm in group:
        if norm.module is None:
            return Obstacle("not-a-module", f"{norm.obstacle}.")
        if norm not in where:
            return Obstacle("unused", "nothing that the model returns depends on it.")
    if found := misuse(path, group, analysis.graph):
        return found
    settings = group[0].module or {}
    own = [f"{path}.{settings[key]}" for key in ("weight", "bias") if settings.get(key)]
    if not own:
        return Obstacle("no-weight", "it has no weight or bias.")
    try:
        moved = moved_norm(analysis, group, untied)
    except Unfoldable as why:
        return Obstacle("unfoldable", f"its weight and bias stay: {why}.")
    changed = [*own, *(name for reader in moved.readers for name in (reader.weight, reader.bias) if name)]
    if kept := next((name for name in changed if _is_kept(name, options.keep)), None):
        return Obstacle("kept", f"its weight and bias stay: --keep says so of `{kept}`.")
    return moved


def _check_kept(graph: Graph, patterns: str | None) -> None:
    """Refuse a name that keeps nothing: what it was meant to keep would change without a word.

    Raises:
        InputError: no tensor and no module is called so.
    """
    names = [name for parameter in graph.parameters.values() for name in parameter.aliases]
    if patterns is not None and not _patterns(patterns):
        raise InputError(f"--keep {patterns!r}: names no tensor and no module")
    for pattern in _patterns(patterns):
        if not any(_is_kept(name, pattern) for name in names):
            raise InputError(f"--keep {pattern}: the model has no tensor and no module of that name")


def _patterns(patterns: str | None) -> list[str]:
    return [pattern.strip() for pattern in (patterns or "").split(",") if pattern.strip()]


def _is_kept(name: str, patterns: str | None) -> bool:
    """Whether a tensor, or a module that it is of, is among the names and patterns that --keep lists."""
    parts = name.split(".")
    names = [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
    return any(fnmatchcase(one, pattern) for pattern in _patterns(patterns) for one in names)
