"""The census of doors: is a converted model the original in each way that it is entered and left?

Each model is built small, planned, and the plan applied to perturbed float64 weights. Then every way in (embeddings in
place of ids, with two sizes and a padding mask) and every way out (features, intermediate layers, hidden states) is
called on both. A difference that the plan does not list is silent, and must not be.

    python tools/census/doors.py --library transformers --minutes 30     # goes on where it stopped
    python tools/census/doors.py --library timm --only vit_base_patch16_224
    python tools/census/doors.py --write                                 # section and column of docs/coverage.md
"""

from __future__ import annotations

import contextlib
import operator
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

PAGE = ROOT / "docs" / "coverage.md"
WORK = ROOT / "build" / "doors.jsonl"
HEADING = "## Doors"
MEANINGS = (
    "*proved* is traced and compared; *exact* is compared; *shifted* is listed by the plan; *not traced* is named by "
    "it as not proved; *not called* takes none of the inputs."
)
BASE = "base model"
SIZES = ("random", "single", "one-token", "padded-right")
"""The probes that every door is called with."""
OUTCOMES = ("proved", "exact", "shifted", "not traced", "not called", "SILENT DIFFERENCE")

Row = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    """Sweep what is left, then print the summary. Returns 1 if there is a silent difference."""
    from tools.census.coverage import _keys
    from tools.census.sweep import options, read_rows, sweep

    parser = options(str(__doc__), WORK, "section and column")
    parser.add_argument("--library", action="append", choices=("transformers", "timm"), help="default: both")
    parser.add_argument("--method", default="rmsnorm", choices=("rmsnorm", "crmsnorm", "fuse-bn"))
    parser.add_argument("--most", type=int, default=10**6, help="at most so many models")
    arguments = parser.parse_args(argv)
    rows = read_rows(arguments.work)
    if arguments.write:
        write(PAGE, list(rows.values()))
        return 0
    norm = "BatchNorm" if arguments.method == "fuse-bn" else "LayerNorm"
    keys = list(_keys(arguments.library or ("transformers", "timm"), set(arguments.only), norm))
    todo = [key for key in keys if key not in rows][: arguments.most]

    def row_of(library: str, name: str) -> Row:
        return {"method": arguments.method, **census_of(library, name, arguments.method)}

    sweep(arguments, todo, rows, row_of, lambda row: row.get("failure") or row.get("skipped") or row.get("doors"))
    print(summary(list(rows.values())))
    return int(any("SILENT DIFFERENCE" in (row.get("doors") or {}).values() for row in rows.values()))


def summary(rows: list[Row]) -> str:
    """One line: models, and how many doors have which outcome."""
    converted = [row for row in rows if row.get("converted")]
    found = Counter(outcome for row in converted for outcome in row["doors"].values())
    counts = ", ".join(f"{found[outcome]} {outcome}" for outcome in OUTCOMES)
    return f"{len(rows)} models, {len(converted)} converted: {sum(found.values())} doors, {counts}"


def section(rows: list[Row]) -> list[str]:
    """The section of docs/coverage.md: what was found in all, and what fell short of a proof."""
    found = [row for row in rows if row.get("converted")]
    lines = [HEADING, "", f"Float64 weights, every door with {len(SIZES)} sizes and masks: {summary(rows)}.", ""]
    lines += [f"`python -m tools.census.doors`: {MEANINGS}", "", "| door | models | outcome |", "| --- | --- | --- |"]
    counts = Counter((door.partition(" `")[0], outcome) for row in found for door, outcome in row["doors"].items())
    return [*lines, *(f"| {door} | {count} | {outcome} |" for (door, outcome), count in sorted(counts.items())), ""]


def in_short(row: Row) -> str:
    """One model's doors for the column: how many are proved or exact, and the others by name."""
    good = [door for door, outcome in row["doors"].items() if outcome in ("proved", "exact")]
    rest = [f"{door} {outcome}" for door, outcome in row["doors"].items() if door not in good]
    return "; ".join([*([f"{len(good)} as before"] if good else []), *rest]).replace("`", "")


def write(page: Path, rows: list[Row]) -> None:
    """Write the section of the page, and the column *doors* of its tables of rmsnorm; again, if it has them."""
    from tools.census.sections import write_under

    page.write_text(_with_column(page.read_text(encoding="utf-8"), rows), encoding="utf-8")
    write_under(page, HEADING, section(rows))


def _with_column(page: str, rows: list[Row]) -> str:
    told = {row["name"]: in_short(row) for row in rows if row.get("converted")}
    lines: list[str] = []
    columns: list[str] = []
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.removeprefix("|").removesuffix("|").split("|")]
        if "crmsnorm" in cells and "reasons of the rest" in cells:
            columns, last = [name for name in cells if name != "doors"], "doors"
        elif columns and line.startswith("|"):
            name = cells[columns.index("model") if "model" in columns else 0].strip("`")
            last = "---" if cells[0] == "---" else told.get(name, "")
        else:
            columns = []
        lines.append(f"| {' | '.join([*cells[: len(columns)], last])} |" if columns else line)
    return "\n".join([*lines, ""])


def census_of(library: str, name: str, method: str) -> Row:
    """Convert one model and call its doors."""
    from normconvert.errors import TraceError
    from normconvert.rewrites.planning import plan_model
    from normconvert.verification.algebra import algebra_model
    from normconvert.verification.equivalence import tolerance_for
    from tools.census.zoo.case import Skipped
    from tools.census.zoo.fidelity import NOISE, in_float64, with_neighbouring_numbers
    from tools.census.zoo.timm_zoo import timm_case
    from tools.census.zoo.transformers_zoo import transformers_case

    make, level = transformers_case if library == "transformers" else timm_case, 0
    while True:
        try:
            case, level = make(name, level)
            if not (case.batchnorms if method == "fuse-bn" else case.layernorms):
                return {"skipped": "no norms"}
            plan = plan_model(case.skeleton(), method=method)
        except Skipped as error:
            return {"skipped": str(error)}
        except TraceError as error:
            if (level := level + 1) > 2:
                return {"failure": str(error)[:200]}
        else:
            break
    row: Row = {"model_class": case.model_class, "converted": len(plan.converted), "norms": len(plan.verdicts)}
    if not plan.converted:
        return {**row, "doors": {}}
    truth = in_float64(case.build())
    converted = algebra_model(truth, plan)
    worst: dict[str, float] = {}
    own: dict[str, float] = {}
    for door, call in calls(case.skeleton(), truth):
        apart = difference(truth, converted, call)
        if apart > tolerance_for(plan):  # as far as the original is from itself by rounding, that is no difference
            by_rounding = NOISE * difference(truth, with_neighbouring_numbers(truth), call)
            own[door] = max(own.get(door, 0.0), apart if apart <= by_rounding else 0.0)
            apart = 0.0 if apart <= by_rounding else apart
        worst[door] = max(worst.get(door, -1.0), apart)
    listed = {entry["door"] for entry in plan.shifted_doors}
    doors = {
        door: outcome(door, found, tolerance_for(plan), set(plan.doors), listed, set(plan.untraced_doors))
        for door, found in worst.items()
    }
    doors |= {door: "not traced" for door in plan.untraced_doors if door not in doors}
    base = next((door for door in doors if door.startswith(BASE)), "")
    if doors.get(base) == "SILENT DIFFERENCE" and _is_named(case.skeleton(), plan):
        doors[base] = "shifted"
    return {**row, "doors": doors, "errors": worst} | ({"own_rounding": own} if any(own.values()) else {})


def _is_named(skeleton: Any, plan: Any) -> bool:
    """Whether a conversion names the class of the model's base as one for which the plan is not proved."""
    from normconvert.options import Options
    from normconvert.rewrites.families import obstacle_in

    return bool(obstacle_in(getattr(skeleton, skeleton.base_model_prefix), plan, Options()))


def outcome(door: str, error: float, tolerance: float, proved: set[str], shifted: set[str], untraced: set[str]) -> str:
    """What to say of one door, of which ``error`` is the worst relative difference; negative if no call ran."""
    if error < 0:
        return "not traced" if door in untraced else "not called"
    if error <= tolerance:
        return "proved" if door in proved else "exact"
    return "shifted" if door in shifted else "not traced" if door in untraced else "SILENT DIFFERENCE"


def calls(skeleton: Any, model: Any) -> Iterator[tuple[str, tuple[str, dict[str, Any]]]]:
    """(door, (method of the model, keyword arguments)): each door with inputs of several sizes and masks."""
    from normconvert.tracing.probes import verification_inputs
    from normconvert.tracing.probes.choose import is_timm
    from normconvert.tracing.probes.entrances import entrances
    from normconvert.tracing.probes.extras import encoder_outputs, extra_arguments, feature_methods

    probes = [p for p in verification_inputs(skeleton) if not p.name.startswith("embeds")]
    for inputs in (probe.inputs for probe in probes if probe.name in SIZES):
        if is_timm(skeleton):
            for door in ("forward_features", "forward_intermediates"):
                if hasattr(model, door):
                    yield door, (door, inputs)
            continue
        entered = [one for alternatives in entrances(skeleton, inputs, seed=1) for one in alternatives]
        yield from ((door, ("__call__", one.inputs)) for one in entered for door in one.names)
        shapes = {name: tuple(value.shape) for name, value in results(model, ("__call__", inputs)).items()}
        for door, value in extra_arguments(skeleton, inputs, shapes).items():
            yield door, ("__call__", {**inputs, door: value})
        if (inside := encoder_outputs(skeleton, inputs, shapes)) is not None:
            yield "encoder_outputs", ("__call__", inside)
        yield "hidden_states", ("__call__", {**inputs, "output_hidden_states": True, "return_dict": True})
        for door, taken in feature_methods(skeleton, inputs):
            yield door, (door, taken)
        if (base := getattr(type(model), "base_model_prefix", "")) and hasattr(model, base):
            yield f"{BASE} `{base}`", (f"{base}.__call__", inputs)


def results(model: Any, call: tuple[str, dict[str, Any]]) -> Row:
    """What a call returns, by name; nothing if the model does not take it."""
    import torch

    from normconvert.tracing.exits import with_tensors
    from normconvert.tracing.output_paths import named_values

    with contextlib.suppress(Exception), torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = with_tensors(operator.attrgetter(call[0])(model)(**_in_float64(call[1])))
        return {name: v for name, v in named_values(found) if torch.is_tensor(v) and v.is_floating_point()}
    return {}


def difference(truth: Any, converted: Any, call: tuple[str, dict[str, Any]]) -> float:
    """The worst relative difference of a call's results; -1 if the original does not take the call."""
    expected, found = results(truth, call), results(converted, call)
    worst = 0.0 if expected else -1.0
    for name, value in expected.items():
        other = found.get(name)
        if other is None or other.shape != value.shape:
            return float("inf")
        size = float(value.double().norm())
        if size > 0:
            worst = max(worst, float((other - value).double().norm()) / size)
    return worst


def _in_float64(inputs: Mapping[str, Any]) -> Row:
    import torch
    from torch.utils._pytree import tree_map

    return tree_map(lambda v: v.double() if torch.is_tensor(v) and v.is_floating_point() else v, dict(inputs))


if __name__ == "__main__":
    sys.exit(main())
