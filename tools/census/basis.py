"""The census of changes of basis: what `rotate` and `scale` do to every model with LayerNorm or RMSNorm.

Each model is built small, traced on the meta device, planned for both, and built for real with perturbed weights: the
plan applied to float64 weights must equal the original.

    nice python -m tools.census.basis --minutes 30      # goes on where it stopped
    python -m tools.census.basis --write                # the section of docs/coverage.md
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

PAGE = ROOT / "docs" / "coverage.md"
WORK = ROOT / "build" / "basis.jsonl"
HEADING = "## Another basis"
METHODS = ("rotate", "scale")
POWER = "3"
SECONDS = 600
"""For one model."""

FIRST = """
llama mistral qwen2 qwen3 gemma gemma2 gemma3_text phi3 glm granite olmo olmo2 mixtral deepseek_v2 deepseek_v3
gpt_oss t5 gpt2 opt gpt_neox bloom falcon whisper vit dinov2 siglip clip_text_model bert phi stablelm
starcoder2 nemotron cohere cohere2 smollm3 qwen2_moe qwen3_moe olmoe gptj codegen mt5 umt5 clip
clip_vision_model siglip_vision_model dinov3_vit beit deit swin swinv2 modernbert roberta xglm mpt persimmon
dbrx jamba mamba ernie4_5 helium glm4 exaone4 seed_oss hunyuan_v1_dense
"""
"""The types to begin with."""

Row = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    """Sweep what is left, then print the summary. Returns 1 if a converted model does not compute the same."""
    from tools.census.coverage import _preload
    from tools.census.sections import write_under
    from tools.census.sweep import options, read_rows, sweep

    arguments = options(str(__doc__), WORK).parse_args(argv)
    rows = read_rows(arguments.work)
    if arguments.write:
        write_under(PAGE, HEADING, section(list(rows.values())))
    else:
        _preload("rmsnorm")
        sweep(arguments, _keys(arguments.only), rows, _apart, _told)
    print(summary(list(rows.values())))
    found = [row[m] for row in rows.values() for m in METHODS if m in row]
    return int(any(one.get("mismatch") for one in [*found, *(one["moved"] for one in found if "moved" in one)]))


def _told(row: Row) -> object:
    return row.get("failure") or [outcome(row[method]) for method in METHODS]


def _apart(library: str, name: str) -> Row:
    """The row of one model, made in a process of its own: whatever ends that, the others are still to be looked at."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, library, name), daemon=True)
    process.start()
    sender.close()
    try:
        found: Row = receiver.recv() if receiver.poll(SECONDS) else {"failure": f"more than {SECONDS} s"}
    except EOFError:
        found = {"failure": "the process ended"}
    process.kill()
    process.join()
    return found


def _send(sender: Any, library: str, name: str) -> None:
    from tools.census.one_model import first_line

    try:
        sender.send(bases_of(library, name))
    except Exception as error:
        sender.send({"failure": first_line(error)})


def _keys(only: list[str]) -> list[tuple[str, str]]:
    from tools.census.zoo.timm_zoo import timm_names
    from tools.census.zoo.transformers_zoo import transformers_types

    first = FIRST.split()
    types = [name for name in first if name in set(transformers_types())]
    types += [name for name in transformers_types() if name not in first]
    keys = [("transformers", name) for name in types]
    # One of the other library after every second, so that a sweep which is stopped has seen some of both.
    for number, name in enumerate(timm_names()):
        keys.insert(min(len(FIRST.split()) + 3 * number, len(keys)), ("timm", name))
    return [key for key in keys if not only or key[1] in only]


def bases_of(library: str, name: str) -> Row:
    """Plan and verify both conversions of one model."""
    from normconvert.errors import NormConvertError
    from normconvert.options import Options
    from normconvert.rewrites.planning import plan_model
    from normconvert.tracing.model_graph import trace_model
    from tools.census.one_model import ATTEMPTS, tracer_of
    from tools.census.zoo.case import Skipped
    from tools.census.zoo.timm_zoo import timm_case
    from tools.census.zoo.transformers_zoo import transformers_case

    make = transformers_case if library == "transformers" else timm_case
    row: Row = {}
    level = 0
    for _ in range(ATTEMPTS):
        try:
            case, level = make(name, level)
        except Skipped as error:
            return row or {"failure": f"skipped: {error}"}
        skeleton = case.skeleton()
        try:
            graph = trace_model(skeleton)
        except NormConvertError as error:
            row, level = row or {"failure": f"not traced: {str(error).splitlines()[0][:200]}"}, level + 1
            continue
        row = {"model_class": case.model_class}
        tracer = tracer_of(skeleton, graph)
        for method in METHODS:
            row[method] = _found(case, plan_model(skeleton, Options(power=POWER), method, tracer))
            if row[method]["reasons"]:
                plan = plan_model(skeleton, Options(power=POWER, allow_shifted_outputs=True), method, tracer)
                if len(plan.converted) > row[method]["converted"]:
                    row[method]["moved"] = _found(case, plan)
        return row
    return row


def _found(case: Any, plan: Any) -> Row:
    from tools.census.zoo.fidelity import fidelity

    norms = [v for v in plan.verdicts if v.code not in ("unreached", "unused", "branch")]
    row: Row = {"norms": len(norms), "converted": len(plan.converted)}
    row["reasons"] = dict(Counter(v.code for v in norms if not v.converted))
    kept = [v for v in norms if not v.converted]
    if kept:
        row["example"] = f"`{kept[0].path}`: {kept[0].reason}"[:300]
    row["stated"] = all(edit.get("stated") for edit in plan.modules)
    return row | (fidelity(case, plan) if plan.converted else {})


def outcome(found: Row) -> str:
    """One cell of the table."""
    if "moved" in found:
        return f"{_outcome(found)}; *moved*: {_outcome(found['moved'])}"
    return _outcome(found)


def _outcome(found: Row) -> str:
    if found.get("mismatch"):
        return "**mismatch**"
    if not found["norms"]:
        return ""
    if not found["converted"]:
        return f"refused: {', '.join(found['reasons'])}"
    own = "" if found["stated"] else ", ε by its own edit"
    if "unverified" in found:
        return f"unverified{own}"
    if found["converted"] == found["norms"]:
        return f"complete{own}"
    return f"{found['converted']} of {found['norms']}{own} ({', '.join(found['reasons'])})"


def summary(rows: list[Row]) -> str:
    """One line a conversion."""
    lines = []
    for method in METHODS:
        found = [row[method] for row in rows if method in row and row[method]["norms"]]
        states = Counter(_outcome(one).split(":")[0].split(",")[0].split(" (")[0] for one in found)
        moved = [one["moved"] for one in found if "moved" in one]
        partly = sum(0 < one["converted"] < one["norms"] and "unverified" not in one for one in found)
        lines.append(
            f"{method}: {len(found)} models with norms, {states['complete']} complete, {partly} partly, "
            f"{states['refused']} refused, {states['unverified']} unverified, {states['**mismatch**']} mismatches; "
            f"*moved*: {sum(one['converted'] == one['norms'] for one in moved)} more complete, "
            f"{sum(one.get('mismatch', False) for one in moved)} mismatches"
        )
    return "\n".join(lines)


def section(rows: list[Row]) -> list[str]:
    """The section of docs/coverage.md."""
    shown = [row for row in rows if any(row.get(m, {}).get("norms") for m in METHODS)]
    failed = Counter(row["failure"].split(":")[0] for row in rows if "failure" in row)
    lines = [
        HEADING, "",
        f"What `normconvert rotate` and `normconvert scale` (by 2^-{POWER}) do to models with LayerNorm or RMSNorm,",
        "small and with perturbed weights, verified in float64. Norms that no traced call runs are not",
        "counted, and of those that stay none that reads no residual stream: of queries and keys, say.",
        "*ε by its own edit*: no config can say the new ε, so the library alone reads the old one. *moved*: with",
        "`--allow-shifted-outputs`, where that takes more; what then changes of the outputs is not compared.", "",
        *(f"- {line}" for line in summary(rows).splitlines()),
        f"- not built or not traced: {sum(failed.values())} of {len(rows)} tried", "",
        "Made by `python -m tools.census.basis`.", "",
        "| library | model | rotate | scale | largest error |", "| --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for row in sorted(shown, key=lambda row: (row["library"] != "transformers", row["name"])):
        errors = [row[m]["error"] for m in METHODS if row[m].get("error") is not None]
        worst = f"{max(errors):.1e}" if errors else ""
        lines.append(
            f"| {row['library']} | `{row['name']}` | {outcome(row['rotate'])} | {outcome(row['scale'])} | {worst} |"
        )
    examples: dict[tuple[str, str], str] = {}
    for row in shown:
        for method in METHODS:
            for code in list(row[method]["reasons"])[:1]:
                examples.setdefault((method, code), f"{row['name']}, {row[method].get('example', '')}")
    lines += ["", "Why norms stay, an example each:", ""]
    lines += [f"- {method}, {code}: {text}" for (method, code), text in sorted(examples.items())]
    return [*lines, ""]


if __name__ == "__main__":
    sys.exit(main())
