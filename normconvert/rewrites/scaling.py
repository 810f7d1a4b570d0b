"""scale: the residual streams times a power of two, without changing what the model computes.

A value x of a stream that norms alone read may be stored as s x: x / sqrt(mean(x^2) + eps) = s x / sqrt(mean((s x)^2) +
s^2 eps), for RMSNorm and LayerNorm alike. Everything that writes into the stream takes s, the norms that read it take
s^2 for their eps, and their weights and readers stay. With s = 2^-k no number is rounded anew (but for what leaves the
dtype's range): a stream that overflows float16 fits into it.

A number passes where a rotation does not: the weight of a layer scale takes it, and that of a norm whose result is
written into the stream. A table that is the output head, too, stays one where the norm before the head takes 1 / s.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from normconvert.analysis.norms import Norm, is_float32_cast
from normconvert.analysis.streams import AxisRef, Provenance, Stream
from normconvert.errors import InputError
from normconvert.options import Options, powers_in
from normconvert.plan.conversion_plan import Plan, Verdict
from normconvert.rewrites.centring import doors_of
from normconvert.rewrites.epsilons import epsilon_edit, epsilons_in_config
from normconvert.rewrites.folding import CASTS
from normconvert.rewrites.moved_norms import Moved, doors_behind, other_outputs, shifted_outputs
from normconvert.rewrites.readers import values_behind
from normconvert.rewrites.registry import rewrite
from normconvert.rewrites.rmsnorm import shifted_doors
from normconvert.rewrites.scalable import Search, factor, groups_of, norm_of, readers_of_stream, search_scale
from normconvert.rewrites.ties import table_and_head
from normconvert.rewrites.untying import untie_head
from normconvert.rewrites.verdicts import in_a_branch, never_called, with_nothing_compared
from normconvert.rewrites.writers import Edits
from normconvert.tracing.graph import Graph
from normconvert.tracing.in_place_writes import boundary_of

ASSUMED = 1
"""The power of a plan that is made before anything was measured: its verdicts hold for any."""


@rewrite("scale", compared="verification")
def plan_scale(graph: Graph, options: Options) -> Plan:
    """The plan that multiplies every stream which provably allows it by the power of two that ``options`` give it.

    Every norm gets a verdict: it is converted if what it reads is scaled.

    Raises:
        InputError: ``power`` is no number, names a norm that reads no such stream, or leaves float32 no ε.
    """
    search = search_scale(graph, options)
    powers = _powers(search, options.power)
    numbers = _Numbers(search)
    for stream in search.streams:
        if powers[id(stream)]:
            numbers.add(stream, -powers[id(stream)])
    tensors = numbers.edits()
    config: dict[str, Any] = {}
    notes = [untie_head(graph, table, head, tensors, config) for head, table in numbers.copies.items()]
    paths = [p for p, group in search.calls.items() if search.reads(group[0]) and _power(search, powers, group[0])]
    converted = [norm for path in paths for norm in search.calls[path]]
    modules = [
        epsilon_edit(norm, search.attributes[path], _eps(search, path) * 4.0 ** -_power(search, powers, norm))
        for path in paths
        for norm in search.calls[path][:1]
        if search.attributes[path] != []
    ]
    _check_epsilons(modules, options.power)
    config |= epsilons_in_config(graph.modules[""], [row for row in modules if row["op"] == "epsilon"])
    needed = {ref for stream in search.streams if powers[id(stream)] for ref in stream.members}
    scaled = [stream for stream in search.streams if powers[id(stream)]]
    shifted = shifted_outputs(graph, scaled, [])
    if shifted and not other_outputs(graph, shifted):
        return with_nothing_compared(plan_scale(graph, replace(options, allow_shifted_outputs=False)))
    doors = doors_of(graph, needed)
    float32 = any(n.float32 for n in converted) or any(is_float32_cast(ref[0]) for ref in needed)
    return Plan(
        "scale",
        tensors=tensors,
        aliases={name: names for name, names in numbers.aliases.items() if name in tensors},
        modules=modules,
        config=config,
        verdicts=[_verdict(search, path, powers, options) for path in search.calls]
        + never_called(graph, set(search.calls)),
        notes=notes + _notes(tensors, modules, doors, shifted) + ([CASTS] if float32 else []),
        float32_norms=float32,
        untraced_doors=doors,
        shifted_doors=_doors_out(search, scaled, tensors),
        shifted_outputs=shifted,
    )


def name_of_group(group: list[Stream]) -> str:
    """The norm that streams which take one number are called by: the first that reads one of them."""
    return group[0].norms[0][0].path


def _powers(search: Search, asked: str | None) -> dict[int, int]:
    """Stream, by identity -> the power of two that it is divided by.

    Raises:
        InputError: see :func:`plan_scale`.
    """
    given = powers_in(asked)
    groups = groups_of(search)
    paths = {norm.path for group in groups for stream in group for norm, _ in stream.norms}
    if isinstance(given, dict) and (unknown := given.keys() - paths):
        raise InputError(f"--power {min(unknown)}=…: no norm of that name reads a stream that can be scaled")
    found: dict[int, int] = {}
    for group in groups:
        power: int
        if isinstance(given, dict):
            own = {given[norm.path] for stream in group for norm, _ in stream.norms if norm.path in given}
            if len(own) > 1:
                raise InputError(f"--power {asked}: these norms read streams that take one number")
            power = own.pop() if own else 0
        else:
            power = ASSUMED if given is None else given
        found |= {id(stream): power for stream in group}
    return found


def _power(search: Search, powers: dict[int, int], norm: Norm) -> int:
    return powers[id(search.where[norm][0])]


def _eps(search: Search, path: str) -> float:
    return float((search.calls[path][0].module or {})["eps"])


def _check_epsilons(rows: list[dict[str, Any]], asked: str | None) -> None:
    """Refuse a power that no norm could compute with: float32 would hold neither its eps nor the squares beside it.

    Raises:
        InputError: names the norm.
    """
    held = torch.finfo(torch.float32)
    for row in rows:
        if not held.tiny <= row["eps"] <= held.max:
            raise InputError(
                f"--power {asked}: the ε of `{row['path']}` would be {row['eps']:.2g}, which float32 does not hold: "
                "choose a power nearer to zero"
            )


class _Numbers:
    """What each tensor is multiplied by, as powers of two.

    Attributes:
        exponents: tensor -> by what it does (writes, reads, precedes a head) -> the power; and what the model adds to
            the stored numbers.
        copies: head that a table is untied from -> the table.
    """

    def __init__(self, search: Search) -> None:
        self._search = search
        self.exponents: dict[str, dict[str, tuple[int, float]]] = defaultdict(dict)
        self.copies: dict[str, str] = {}
        self.aliases: dict[str, list[str]] = {}

    def add(self, stream: Stream, exponent: int) -> None:
        """What it takes to multiply a stream by 2^exponent."""
        for ref, made in stream.members.items():
            self._write(ref, made, exponent)
        for weight in readers_of_stream(self._search, stream).values():
            self._take(self._named(weight), "reads", -exponent)

    def _write(self, ref: AxisRef, made: Provenance, exponent: int) -> None:
        if made.kind == "scale" and (take := factor(self._search, made)) is not None:
            self._take(take.name, "scales", exponent, take.offset)
        elif made.kind == "norm":
            self._norm(norm_of(self._search, ref[0]), "writes", exponent)
        elif ref in self._search.untied:
            name, head = table_and_head(self._search.analysis.graph, ref[0])
            self.copies[head] = name
            if len(names := [n for n in self._search.analysis.graph.parameters[ref[0]].aliases if n != head]) > 1:
                self.aliases[name] = names
            self._take(name, "writes", exponent)
        elif made.kind == "parameter":
            self._take(self._named(ref[0]), "writes", exponent)
            for path in self._search.heads.get(ref[0], ()):
                self._norm(self._search.calls[path][0], "head", -exponent)

    def _named(self, node: fx.Node) -> str:
        parameter = self._search.analysis.graph.parameters[node]
        if len(parameter.aliases) > 1:
            self.aliases[parameter.name] = list(parameter.aliases)
        return parameter.name

    def _norm(self, norm: Norm, role: str, exponent: int) -> None:
        settings = norm.module or {}
        self._take(f"{norm.path}.{settings['weight']}", role, exponent, settings["offset"])
        if settings["bias"] is not None:
            self._take(f"{norm.path}.{settings['bias']}", role, exponent)

    def _take(self, name: str, role: str, exponent: int, offset: float = 0.0) -> None:
        # Several values may ask for the same of one tensor, which must not be scaled twice.
        if self.exponents[name].setdefault(role, (exponent, offset)) != (exponent, offset):
            raise AssertionError(f"{name} is to take two numbers")

    def edits(self) -> Edits:
        """The rows of a plan."""
        found: Edits = {}
        for name, roles in self.exponents.items():
            exponent, offset = sum(power for power, _ in roles.values()), max(added for _, added in roles.values())
            if exponent:
                found[name] = [{"op": "times", "exponent": exponent, **({"offset": offset} if offset else {})}]
        return found


def _verdict(search: Search, path: str, powers: dict[int, int], options: Options) -> Verdict:
    group = search.calls[path]
    kind = group[0].kind
    if all(search.reads(norm) for norm in group):
        power = _power(search, powers, group[0])
        if not power:
            return Verdict(path, kind, False, "its stream fits as it is: it is multiplied by one.", "fits")
        s = "a power of two" if options.power is None else f"2^{-power}"
        return Verdict(path, kind, True, f"its stream is multiplied by {s}, its ε by the square of that.", "converted")
    why = search.refused.get(path) or next(
        search.stays[id(search.where[norm][0])] for norm in group if not search.reads(norm)
    )
    if read := [search.where[norm][0] for norm in group if norm in search.where]:
        why = in_a_branch(why, read, search.analysis)
    return Verdict(path, kind, False, why.reason, why.code)


def _notes(tensors: Edits, modules: list[dict[str, Any]], doors: list[str], shifted: list[str]) -> list[str]:
    found = [f"scaled are returned: {', '.join(shifted)}"] if shifted else []
    if doors:
        found.append(f"{', '.join(doors)} must be scaled, as what the output's own embeddings give is")
    other = [row["path"] for row in modules if not row.get("stated")]
    if other:
        found.append(
            f"no config gives {len(other)} norms their new ε (`{other[0]}`, say): load it by normconvert or with "
            "trust_remote_code; the unmodified class takes the old one"
        )
    added = [name for name, rows in tensors.items() if any("offset" in row for row in rows)]
    if added:
        found.append(
            f"{len(added)} weights to which the model adds 1 are rounded anew, to half a unit: `{added[0]}`, say; all "
            "other numbers are exact"
        )
    return found


def _doors_out(search: Search, scaled: list[Stream], tensors: Edits) -> list[dict[str, Any]]:
    """The ways out, other than the model's outputs, that return scaled streams, or what the norms before heads give."""
    found = shifted_doors(search.analysis, scaled)
    for path in dict.fromkeys(path for paths in search.heads.values() for path in paths):
        group = search.calls[path]
        if f"{path}.{(group[0].module or {})['weight']}" in tensors:
            starts: list[AxisRef] = [(n.output, n.place) for n in group if n.place is not None]
            values, _ = values_behind(search.analysis, starts, False)
            rows = doors_behind(search.analysis.graph, [Moved(group, [], values, bias_stays=False)])
            found += [row for row in rows if row not in found]
    return found


def watched(search: Search) -> dict[str, set[tuple[str, str, str]]]:
    """Norm that a group of streams is called by -> where their values pass a module's boundary."""
    found = {}
    for group in groups_of(search):
        nodes = {node for stream in group for node, _ in stream.members}
        keys = {key for node in nodes if (key := boundary_of(node)) is not None and key[1] in ("input", "output")}
        found[name_of_group(group)] = keys
    return found
