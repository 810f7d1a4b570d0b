"""How tracing and planning grow with the number of layers; writes its section of docs/performance.md.

    python -m tools.benchmarks.growth [--layers 12 24 48 96] [--runs 3] [--write]

Each size is a process of its own: a GPT-2 of small width, on the meta device. Five minutes on an idle core;
``--layers 2 4`` tries it.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

LAYERS, LONGEST, WIDTH = (12, 24, 48, 96), 30.0, 64
"""The criteria: at most LONGEST seconds for the largest, and growth that is linear."""
LINEAR = 1.25
"""Time a layer of the largest model, at most this many times that of the model half its size."""
METHODS = ("rmsnorm", "crmsnorm")


def one(layers: int, method: str) -> dict[str, float]:
    """Processor seconds and peak memory of trace and plan, without imports and building the model."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from normconvert.options import Options
    from normconvert.rewrites.planning import plan_model
    from normconvert.tracing.model_graph import trace_model

    def skeleton(layers: int) -> Any:
        with torch.device("meta"):
            tokens = {"vocab_size": 500, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2}
            config = GPT2Config(n_layer=layers, n_embd=WIDTH, n_head=4, **tokens)
            return GPT2LMHeadModel(config).eval()

    torch.set_num_threads(1)
    plan_model(skeleton(1), Options(), method)  # what is imported and cached by the first use
    model = skeleton(layers)
    before = _peak()
    start = time.process_time()
    graph = trace_model(model)
    traced = time.process_time() - start
    plan = plan_model(model, Options(), method, lambda wanted: graph if wanted is model else trace_model(wanted))
    seconds = time.process_time() - start
    assert len(plan.converted) == 2 * layers + 1, plan.kept
    return {"trace": traced, "plan": seconds - traced, "megabytes": _peak() - before}


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e3 if sys.platform != "darwin" else 1e6)


def measure(layers: list[int], runs: int) -> dict[str, dict[str, list[dict[str, float]]]]:
    """method -> layers -> runs."""
    found: dict[str, dict[str, list[dict[str, float]]]] = {method: {} for method in METHODS}
    for _ in range(runs):
        for count in layers:
            for method in METHODS:
                command = [sys.executable, "-m", "tools.benchmarks.growth", "--one", str(count), "--method", method]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
                run = json.loads(done.stdout.splitlines()[-1])
                found[method].setdefault(str(count), []).append(run)
                shown = f"trace {run['trace']:.1f} s, plan {run['plan']:.1f} s, {run['megabytes']:.0f} MB"
                print(f"{method:8} {count:3} layers: {shown}", flush=True)
    return found


def middle(runs: list[dict[str, float]], *keys: str) -> float:
    """The median of a sum of figures."""
    return statistics.median(sum(run[key] for key in keys) for run in runs)


def section(found: dict[str, dict[str, list[dict[str, float]]]]) -> str:
    """The section of the page."""
    lines = [
        "## Growth with depth",
        "",
        "Written by `python -m tools.benchmarks.growth --write`. Tracing and planning a GPT-2 of width "
        f"{WIDTH} on one thread, each size in a process of its own, without imports: processor time, medians of "
        f"{max(len(runs) for sizes in found.values() for runs in sizes.values())} runs. Memory is what the process "
        "takes beyond the imports.",
        "",
        "| layers | | trace | plan | together | a layer | memory |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {count} | {method} | {middle(runs, 'trace'):.1f} s | {middle(runs, 'plan'):.1f} s "
        f"| {middle(runs, 'trace', 'plan'):.1f} s | {1000 * middle(runs, 'trace', 'plan') / int(count):.0f} ms "
        f"| {middle(runs, 'megabytes'):.0f} MB |"
        for method, sizes in found.items()
        for count, runs in sizes.items()
    ]
    return "\n".join([*lines, "", *(judge(method, sizes) for method, sizes in found.items())])


def judge(method: str, sizes: dict[str, list[dict[str, float]]]) -> str:
    """Whether a method's growth meets the criteria, in a sentence."""
    counts = sorted(map(int, sizes))
    each = {count: middle(sizes[str(count)], "trace", "plan") / count for count in counts}
    memory = {count: middle(sizes[str(count)], "megabytes") / count for count in counts}
    seconds = each[counts[-1]] * counts[-1]
    half = counts[-2] if len(counts) > 1 else counts[-1]
    growth = [per[counts[-1]] / max(per[half], 1e-9) for per in (each, memory)]
    met = seconds <= LONGEST and max(growth) <= LINEAR
    return (
        f"`{method}`: {seconds:.1f} s at {counts[-1]} layers (allowed {LONGEST:.0f} s); a layer takes "
        f"{growth[0]:.2f} × the time and {growth[1]:.2f} × the memory that it takes at {half} (allowed {LINEAR} ×): "
        f"{'met' if met else 'NOT met'}.\n"
    )


def main() -> None:
    """Measure, print, and write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=list(LAYERS))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--method", choices=METHODS, default=METHODS[0], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        print(json.dumps(one(arguments.one, arguments.method)))
        return
    text = section(measure(arguments.layers, arguments.runs))
    print(text)
    if arguments.write:
        from tools.benchmarks.models import SECTIONS
        from tools.docs.pages import write_section

        write_section(ROOT / "docs" / "performance.md", "growth", text, SECTIONS)


if __name__ == "__main__":
    main()
