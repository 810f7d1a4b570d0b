"""The anatomy of a model, for tools that quantise it: who reads each norm, who writes into each stream, what is paired.

Exact names of tensors and modules, from the traced graph. What cannot be said of a norm or a stream is said with the
reason: a mapping that leaves a reader out would be wrong without a word.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from normconvert.analysis.norms import Norm, by_path, find_norms
from normconvert.analysis.streams import Analysis, AxisRef, Stream, operation
from normconvert.errors import InputError, first_line
from normconvert.files.user_paths import STDOUT, user_path
from normconvert.rewrites.centring import can_untie
from normconvert.rewrites.moved_norms import tables_to_untie
from normconvert.rewrites.readers import Unfoldable, readers_of
from normconvert.rewrites.values import Pair, product_pairs, value_pairs
from normconvert.tracing.graph import Graph

FORMAT = 1


def anatomy_of(graph: Graph) -> dict[str, Any]:
    """Norms with their readers, streams with their writers, and pairs of linear maps, as JSON-ready data.

    Several calls of a model, with ids and with embeddings say, are told as one.
    """
    norms = find_norms(graph, uncentred=True)
    analysis = Analysis(graph, norms, mean_only=False)
    calls = by_path(norms)
    untied = {name: head for name, (_, head) in tables_to_untie(analysis).items()}
    members = {ref for stream in analysis.streams for ref in stream.members}
    return {
        "format": FORMAT,
        "norms": [_norm(analysis, path, group, untied) for path, group in calls.items()],
        "streams": _merged(_stream(analysis, stream, members) for stream in analysis.streams),
        "tied": [[table, head] for table, head in untied.items()],
        "values": _merged(_values(analysis, pair) for pair in value_pairs(analysis) if pair.rows is None),
        "products": _merged(_values(analysis, pair) for pair in product_pairs(analysis)),
    }


def _norm(analysis: Analysis, path: str, group: list[Norm], untied: dict[str, str]) -> dict[str, Any]:
    """A norm; ``readers`` is empty and ``why`` a clause where something else than linear maps reads it."""
    settings = group[0].module or {}
    row: dict[str, Any] = {"name": path, "kind": group[0].kind, "centred": group[0].centred}
    row |= {key: settings.get(key) for key in ("size", "eps", "weight", "bias", "offset")}
    try:
        found, _ = readers_of(analysis, group, untied, bias_stays=True, through=("features",))
    except Unfoldable as why:
        return {**row, "readers": [], "why": f"{why}"}
    return {**row, "readers": [_named(reader.weight) for reader in found], "why": ""}


def _stream(analysis: Analysis, stream: Stream, members: set[AxisRef]) -> dict[str, Any]:
    """A stream; ``members`` are the values of all of them."""
    writers: list[str] = []
    others: list[str] = []
    for ref, made in stream.members.items():
        if made.kind == "parameter":
            writers.append(_tensor(analysis, ref))
        elif ref[0] in analysis.graph.outside:
            continue  # embeddings that a call may be given in place of ids
        elif made.reason or made.rest:
            others.append(made.reason or made.rest)
        elif made.kind == "scale":
            others.append("a scale by channel")
    return {
        "size": stream.size,
        "norms": list(dict.fromkeys(norm.path for norm, _ in stream.norms)),
        # Norms over several of its values side by side: where its channels are among theirs.
        "merged": {
            norm.path: {"outer": int(ref[1].outer), "inner": int(ref[1].inner)}
            for norm, ref in stream.norms
            if ref[1] != norm.place
        },
        "writers": [_named(name) for name in dict.fromkeys(writers)],
        "other_writers": list(dict.fromkeys(others)),
        "other_readers": list(
            dict.fromkeys(
                [
                    *(leak.reason for leak in stream.leaks if leak.code != "features"),
                    *_written_elsewhere(analysis, stream, members),
                ]
            )
        ),
        "doors": list(dict.fromkeys(leak.reason for leak in stream.leaks if leak.code == "features")),
    }


def _written_elsewhere(analysis: Analysis, stream: Stream, members: set[AxisRef]) -> Iterator[str]:
    """Clauses for the tensors that make something else as well, which would turn with the stream."""
    for ref, made in stream.members.items():
        if made.kind != "parameter":
            continue
        others = list(analysis.other_readers(ref, members.__contains__))
        # A table and its head are told as tied, and can be two tensors.
        if others and not can_untie(analysis, ref, others):
            yield f"`{_tensor(analysis, ref)}` writes into it, and {operation(others[0])} reads that, too"


def _values(analysis: Analysis, pair: Pair) -> dict[str, Any]:
    """A pair; ``heads`` is how many parts of ``size`` the writers make and the readers take."""
    writers = {_tensor(analysis, ref): int(ref[1].outer) for ref in pair.writers}
    readers = {reader.weight: int(reader.place.outer) for reader in pair.readers}
    return {
        "size": pair.stream.size,
        "heads": [max(writers.values()), max(readers.values())],
        "writers": [_named(name) for name in writers],
        "readers": [_named(name) for name in readers],
    }


def _tensor(analysis: Analysis, ref: AxisRef) -> str:
    return analysis.graph.parameters[ref[0]].name


def _named(tensor: str) -> dict[str, str]:
    return {"module": tensor.rpartition(".")[0], "tensor": tensor}


def _merged(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of all calls without those that say the same of fewer tensors."""
    found: list[dict[str, Any]] = []
    for row in rows:
        names = {one["tensor"] for one in row["writers"]}
        same = next((o for o in found if names & {one["tensor"] for one in o["writers"]} and _alike(o, row)), None)
        if same is None:
            found.append(row)
            continue
        for key, value in row.items():
            if isinstance(value, list) and key != "heads":
                same[key] += [one for one in value if one not in same[key]]
    return found


def _alike(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return bool(a["size"] == b["size"] and a.get("norms") == b.get("norms") and a.get("readers") == b.get("readers"))


def awq(anatomy: dict[str, Any]) -> list[dict[str, Any]]:
    """As AWQ and SmoothQuant take it: a layer whose results take a scale by channel, and who takes the inverse.

    What a tied head takes its table would take, too; and what is several tensors of one module is no layer there.
    """
    tied = {name for names in anatomy["tied"] for name in names}
    rows = [
        {"smooth_layer": norm["name"], "balance_layers": _modules(norm["readers"])}
        for norm in anatomy["norms"]
        if norm["readers"] and norm["weight"] and not norm["offset"] and not _no_layer(norm["readers"])
        if not any(row["tensor"] in tied for row in norm["readers"])
    ]
    for pair in (*anatomy["values"], *anatomy["products"]):
        writers, readers = _modules(pair["writers"]), _modules(pair["readers"])
        # With fewer heads of values than of queries a channel has several readers in one matrix.
        alone = len(writers) == 1 and pair["heads"][0] == pair["heads"][1]
        if alone and not _no_layer([*pair["writers"], *pair["readers"]]):
            rows.append({"smooth_layer": writers[0], "balance_layers": readers})
    return rows


def llm_compressor(anatomy: dict[str, Any]) -> dict[str, Any]:
    """In the terms of llm-compressor's SpinQuant: norm mappings, what R1 turns where, and the pairs of R2.

    Norms that cannot be folded there stand under ``left_out`` with the reason, and so does every stream that R1 may not
    turn.
    """
    mappings: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    folded: dict[str, list[str]] = {}
    for norm in anatomy["norms"]:
        if why := norm["why"] or _unfolded(norm) or _no_layer(norm["readers"]):
            left_out[norm["name"]] = why
            continue
        folded[norm["name"]] = _modules(norm["readers"])
        if norm["weight"] is not None:
            mappings.append({"norm": norm["name"], "linears": folded[norm["name"]]})
    turned = []
    for stream in anatomy["streams"]:
        stays = [
            _no_layer(stream["writers"]),
            *stream["other_writers"],
            *stream["other_readers"],
            *(f"`{norm}` reads several of its values side by side" for norm in stream["merged"]),
            *(left_out.get(n, "") for n in stream["norms"]),
        ]
        if why := next(filter(None, stays), ""):
            left_out[f"the stream that {stream['norms'][0]} reads"] = why
            continue
        into = list(dict.fromkeys(module for norm in stream["norms"] for module in folded[norm]))
        turned.append({"weight_output": _modules(stream["writers"]), "weight_input": into, "size": stream["size"]})
    pairs = [
        {"attn_v": _modules(p["writers"]), "attn_o": _modules(p["readers"]), "attn_head_dim": p["size"]}
        for p in anatomy["values"]
        if not _no_layer([*p["writers"], *p["readers"]])
    ]
    return {"norm_mappings": mappings, "r1": turned, "r2": pairs, "tied": anatomy["tied"], "left_out": left_out}


def _unfolded(norm: dict[str, Any]) -> str:
    """Why a weight may move into the readers here and not there; empty if it may."""
    if norm["centred"]:
        return "it is a LayerNorm: a rotation has to keep the mean"
    if norm["bias"] is not None:
        return "it has a bias, which is not folded there"
    return "its weight is stored without a number that the model adds" if norm["offset"] else ""


def _no_layer(rows: list[dict[str, str]]) -> str:
    """Which of some tensors is not the weight or bias of its module, as layers are named; empty if all are."""
    other = next((row["tensor"] for row in rows if row["tensor"].rpartition(".")[2] not in ("weight", "bias")), None)
    return f"`{other}` is not the weight of a layer" if other is not None else ""


def _modules(rows: list[dict[str, str]]) -> list[str]:
    return list(dict.fromkeys(row["module"] for row in rows))


FORMS: dict[str, Callable[[dict[str, Any]], Any]] = {"graph": dict, "llm-compressor": llm_compressor, "awq": awq}
"""Name of a form -> makes it of the anatomy."""


def write_anatomy(graph: Graph, file: str | Path, form: str) -> None:
    """Write the anatomy of a graph as JSON.

    Args:
        graph: of the model.
        file: where to; ``-`` for stdout.
        form: a row of :data:`FORMS`.

    Raises:
        InputError: the file cannot be written.
    """
    text = json.dumps(FORMS[form](anatomy_of(graph)), indent=1, ensure_ascii=False) + "\n"
    if str(file) == STDOUT:
        print(text, end="", flush=True)
        return
    try:
        user_path(file).write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"--anatomy {file}: {first_line(error)}") from error
