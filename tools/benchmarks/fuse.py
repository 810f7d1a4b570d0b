"""Networks with BatchNorm, as they are and fused; writes its section of docs/performance.md.

    python tools/benchmarks/fuse.py --write [--device cuda] [--threads N] [--seconds S] [--minutes M] [--models NAME]
    python tools/benchmarks/fuse.py --small            # two small pictures, a second a cell: is everything in place?

Every cell is one network, batch and mode: the original, ``normconvert fuse-bn``, ``fuse`` of torch.fx, and the network
with an identity for every BatchNorm, which is the *bound*, are timed interleaved in one process. Where ours leaves
norms that no linear map can take, the network without the others is timed as well: the bound that is within reach.
Weights are random; the time does not depend on them. After ``--minutes`` what is left is marked as not measured: eager
cells come first, since compiling takes most of the time.

``--write`` writes the section, and docs/results/fuse-bn-DEVICE.json, from which the section of a device that is not at
hand is written again.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from normconvert.analysis.affine_norms import find_affine_norms  # noqa: E402
from normconvert.benchmark.bound import without_norms  # noqa: E402
from normconvert.benchmark.compare import compare  # noqa: E402
from normconvert.benchmark.machine import machine  # noqa: E402
from normconvert.benchmark.result import BOUND, CONVERTED, ORIGINAL, WORTH, Row  # noqa: E402
from normconvert.benchmark.timing import Spread  # noqa: E402
from normconvert.benchmark.versions import own_memory  # noqa: E402
from normconvert.benchmark.workloads import Workload, grid, on_device  # noqa: E402
from normconvert.errors import in_one_line  # noqa: E402
from normconvert.options import Options  # noqa: E402
from normconvert.report.benchmark import machine_in_words  # noqa: E402
from normconvert.rewrites.planning import plan_model  # noqa: E402
from normconvert.tracing.model_graph import trace_model  # noqa: E402
from normconvert.verification.algebra import algebra_model  # noqa: E402
from tools.census.fusers import norms_called  # noqa: E402
from tools.docs.pages import write_section  # noqa: E402

DOCS = ROOT / "docs"
NAME = "fuse-bn"
SECTIONS = ("models", "share", "growth", "conversion", "verification", "norm", "writers", "basis", NAME)
"""The sections of docs/performance.md, in order."""
MODELS = ("resnet50", "mobilenetv3_large_100", "regnety_016", "levit_128", "densenet121")
SMALL = ("resnet18", "levit_128s")
BATCHES = (1, 8)
MODES = ("eager", "compiled")
FX, REACH = "torch.fx", "within reach"
SHARE = 0.95
"""The criterion: ours has this much of the bound's speed wherever the bound is above WORTH, and is never slower."""
DEVICES = ("cpu", "cuda")


def build(name: str) -> nn.Module:
    """The network with random weights, in eval mode."""
    import timm

    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name)
    return model.eval()


def versions(name: str, device: torch.device) -> tuple[dict[str, nn.Module], dict[str, int], list[Workload]]:
    """The network in all its versions on ``device``; how many of its norms each takes away; what it is asked to do.

    Raises:
        AssertionError: ours does not compute what the original does.
    """
    original = build(name)
    with torch.device("meta"):
        skeleton = build(name)
    works = grid(skeleton, BATCHES)
    plan = plan_model(skeleton, Options(), "fuse-bn")
    models = {ORIGINAL: original, CONVERTED: algebra_model(copy.deepcopy(original).double(), plan).float()}
    _check_equal(models, works[0])
    norms = {ORIGINAL: 0, CONVERTED: len(plan.converted), BOUND: len(plan.verdicts)}
    try:
        models[FX], norms[FX] = _fused_by_torch_fx(original)
    except Exception as error:  # whatever it cannot trace
        print(f"{name}: torch.fx: {in_one_line(error)}", flush=True)
    models = {version: own_memory(model.to(device)) for version, model in models.items()}
    inputs = on_device(works[0].inputs, torch.float32, device)
    found = find_affine_norms(trace_model(skeleton))
    edits = [{"op": "absorb", "path": norm.path, "keep": list(norm.keep)} for norm in found if norm.calls]
    taken = [verdict.path for verdict in plan.converted]
    wanted = {BOUND: [norm.path for norm in found], **({REACH: taken} if plan.kept else {})}
    for version, paths in wanted.items():
        models[version] = without_norms(models[ORIGINAL], paths, edits, lambda model: model(**inputs))
        norms[version] = len(paths)
    return models, norms, works


def _check_equal(models: Mapping[str, nn.Module], work: Workload) -> None:
    inputs = on_device(work.inputs, torch.float64, torch.device("cpu"))
    with torch.no_grad():
        expected, found = (copy.deepcopy(models[v]).double()(**inputs) for v in (ORIGINAL, CONVERTED))
    error = float((found - expected).norm() / expected.norm())
    assert error <= 1e-5, f"fused, it is {error:.1e} off"


def _fused_by_torch_fx(model: nn.Module) -> tuple[nn.Module, int]:
    from torch.fx.experimental.optimization import fuse

    traced = torch.fx.symbolic_trace(model)
    before = norms_called(traced)
    fused = fuse(copy.deepcopy(traced), no_trace=True)
    assert isinstance(fused, torch.fx.GraphModule)
    return fused.eval(), len(before - norms_called(fused))


def cells(models: Sequence[str]) -> list[tuple[str, str, int]]:
    """(mode, model, batch) in the order they are measured in: what takes long comes last."""
    return [(mode, name, batch) for mode in MODES for name in models for batch in BATCHES]


def measure(models: Sequence[str], device: torch.device, seconds: float, minutes: float) -> Iterator[dict[str, Any]]:
    """A record for every cell: its model, the norms that each version takes away, and its row."""
    end = time.perf_counter() + 60 * minutes
    made: dict[str, tuple[dict[str, nn.Module], dict[str, int], list[Workload]]] = {}
    for mode, name, batch in cells(models):
        if time.perf_counter() > end:
            row = Row(mode, "forward", batch, None, failures={ORIGINAL: f"after {minutes:g} minutes"})
            yield {"model": name, "norms": made[name][1] if name in made else {}, "row": row.to_json()}
            continue
        if name not in made:
            made[name] = versions(name, device)
        networks, norms, works = made[name]
        work = next(w for w in works if w.batch == batch)
        row = compare(networks, work, mode, torch.float32, device, seconds)
        yield {"model": name, "norms": norms, "row": row.to_json()}


def section(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The section in Markdown, from a document for each device."""
    lines = [
        "## BatchNorm: `normconvert fuse-bn`",
        "",
        "Networks of timm with random weights, float32, pictures of each network's own size. Times are medians with "
        "quartiles; a speed is the original's time over a version's own, round by round, with half of what lies "
        "between the quartiles. The *bound* has an identity for every BatchNorm; where no linear map can take some of "
        "them, *within reach* has one for the others. torch.fx is `torch.fx.experimental.optimization.fuse`.",
        "",
        f"The criterion: ours has at least {SHARE:.0%} of the bound's speed wherever the bound is above {WORTH} ×, "
        "and is never slower than the original.".replace("%", " %"),
        "",
    ]
    for device in DEVICES:
        lines += [f"### fuse-bn on {'the CPU' if device == 'cpu' else 'a GPU'}", ""]
        if device in results:
            lines += _device(results[device])
        else:
            lines += [f"Not measured: `python tools/benchmarks/fuse.py --write --device {device}`.", ""]
            lines += _table([{"model": m, "norms": {}, "row": Row(mode, "forward", b, None).to_json()}
                             for mode, m, b in cells(MODELS)])  # fmt: skip
    return "\n".join(lines)


def _device(document: Mapping[str, Any]) -> list[str]:
    records = document["records"]
    load = ", ".join(f"{n:.1f}" for n in document["load"])
    return [
        f"{machine_in_words(document['machine'])}, timm {document['timm']}; load of the machine before and after: "
        f"{load}; {document['minutes']:.0f} minutes in all, made by `{document['command']}`.",
        "",
        *_summary(records),
        "",
        *_table(records),
    ]


def _summary(records: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = {f"{r['model']}, batch {r['row']['batch']}, {r['row']['mode']}": Row.from_json(r["row"]) for r in records}
    measured = {name: row for name, row in rows.items() if CONVERTED in row.speedup and BOUND in row.speedup}
    worth = {name: row for name, row in measured.items() if row.speedup[BOUND].median > WORTH}
    short = [name for name, row in worth.items() if _part(row, BOUND) < SHARE]
    reach = [name for name in short if REACH in worth[name].speedup and _part(worth[name], REACH) >= SHARE]
    slower = [name for name, row in measured.items() if row.speedup[CONVERTED].median < 1]
    clearly = [name for name in slower if measured[name].speedup[CONVERTED].high < 1]
    lines = [
        f"- Measured: {len(measured)} of {len(rows)} cells.",
        f"- The bound is above {WORTH} × in {len(worth)}; ours reaches {SHARE:.0%} of it in "
        f"{len(worth) - len(short)}.".replace("%", " %")
        + (f" Not in: {'; '.join(short)}." if short else ""),
    ]
    if reach:
        lines.append(f"- Of those, it reaches as much of what is within reach in: {'; '.join(reach)}.")
    lines.append(
        f"- Ours is slower than the original by the median in {_listed(slower)}, by more than the quartiles' spread in "
        f"{_listed(clearly)}."
    )
    return lines


def _listed(names: Sequence[str]) -> str:
    return f"{len(names)} cells" + (f" ({'; '.join(names)})" if names else "")


def _part(row: Row, bound: str) -> float:
    """How much of a bound's speed ours has."""
    return row.speedup[CONVERTED].median / row.speedup[bound].median


def _table(records: Sequence[Mapping[str, Any]]) -> list[str]:
    head = ["model", "batch", "mode", "norms fused", "original, ms", "ours", FX, "bound", "of the bound", REACH,
            "of that"]  # fmt: skip
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join(['---'] * len(head))} |"]
    for record in records:
        row, norms = Row.from_json(record["row"]), record["norms"]
        fused = f"{norms[CONVERTED]} of {norms[BOUND]}" if norms else ""
        cells = [record["model"], str(row.batch), row.mode, fused]
        if ORIGINAL not in row.milliseconds:
            said = f" ({row.failures[ORIGINAL]})" if ORIGINAL in row.failures else ""
            lines.append(f"| {' | '.join([*cells, f'not measured{said}', *[''] * 6])} |")
            continue
        own = row.milliseconds[ORIGINAL]
        cells.append(f"{own.median:.1f} ({own.low:.1f} to {own.high:.1f})")
        cells += [_speed(row, CONVERTED), _speed(row, FX) + (f" ({norms[FX]})" if FX in norms else "")]
        for bound in (BOUND, REACH):
            known = bound in row.speedup and CONVERTED in row.speedup and row.speedup[bound].median > WORTH
            cells += [_speed(row, bound), f"{100 * _part(row, bound):.1f} %" if known else ""]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _speed(row: Row, version: str) -> str:
    found: Spread | None = row.speedup.get(version)
    if found is None:
        return "not measured" if version in row.failures else "–"
    return f"{found.median:.3f} × ±{(found.high - found.low) / 2:.3f}"


def _with_others(document: dict[str, Any], path: Path, models: Sequence[str]) -> dict[str, Any]:
    """The document with the records of an earlier one for models that were not measured now, in the usual order."""
    if not path.exists() or set(MODELS) <= set(models):
        return document
    earlier = json.loads(path.read_text())
    if any(earlier[key] != document[key] for key in ("machine", "timm")):
        return document  # measured elsewhere: not to stand beside these
    records = [r for r in earlier["records"] if r["model"] not in models] + document["records"]
    order = {cell: at for at, cell in enumerate(cells(MODELS))}
    records.sort(key=lambda r: order.get((r["row"]["mode"], r["model"], r["row"]["batch"]), len(order)))
    return {**document, "records": records, "minutes": earlier["minutes"] + document["minutes"],
            "load": [*earlier["load"], *document["load"]],
            "command": f"{earlier['command']}` and `{document['command']}"}  # fmt: skip


def main() -> None:
    """Measure, print, and write if asked to."""
    import os

    import timm

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=DEVICES)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=8.0, help="for each cell; five rounds at least")
    parser.add_argument("--minutes", type=float, default=12.0, help="after which no further cell is begun")
    parser.add_argument("--models", nargs="+", default=None, metavar="NAME", help=f"default: {' '.join(MODELS)}")
    parser.add_argument("--small", action="store_true", help=f"{' and '.join(SMALL)}, a second a cell")
    parser.add_argument("--write", action="store_true", help="write docs/performance.md and docs/results/")
    options = parser.parse_args()
    if options.write and options.small:
        parser.error("--small is not worth writing down")
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    device = torch.device(options.device)
    models = options.models or (SMALL if options.small else MODELS)
    start, load = time.perf_counter(), [os.getloadavg()[0]]
    records = []
    for record in measure(models, device, 1.0 if options.small else options.seconds, options.minutes):
        records.append(record)
        print(f"{time.perf_counter() - start:5.0f} s {_table([record])[2]}", flush=True)
        for version, reason in record["row"]["failures"].items():
            print(f"        {version}: {reason}", flush=True)
    document = {
        "machine": machine(device), "timm": timm.__version__, "load": [*load, os.getloadavg()[0]],
        "minutes": (time.perf_counter() - start) / 60,
        "command": " ".join(["python", "tools/benchmarks/fuse.py", *sys.argv[1:]]), "records": records,
    }  # fmt: skip
    found = {device.type: document}
    if options.write:
        (DOCS / "results").mkdir(exist_ok=True)
        document = _with_others(document, DOCS / "results" / f"{NAME}-{device.type}.json", models)
        (DOCS / "results" / f"{NAME}-{device.type}.json").write_text(json.dumps(document, indent=1) + "\n")
        kept = {d: DOCS / "results" / f"{NAME}-{d}.json" for d in DEVICES}
        found = {d: json.loads(path.read_text()) for d, path in kept.items() if path.exists()}
        write_section(DOCS / "performance.md", NAME, section(found), SECTIONS)
    print(section(found))


if __name__ == "__main__":
    main()
