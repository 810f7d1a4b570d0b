"""Conversion beside copying: a float16 GPT-NeoX checkpoint in shards, by normconvert, by ``cp -r`` and the plain way.

Usage: ``python -m tools.benchmarks.convert [--runs 3] [--write]``. Weights are random and lie in a temporary folder;
each way runs in turn, as a whole process, with the page cache warm. ``--write`` writes its section of
docs/performance.md and docs/results/convert.json. ``--small`` takes a model of some megabytes, to try the script. In
full it takes about five minutes, 15 GB of disk and 6 GB of memory (for the plain way).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

DOCS = Path(__file__).parents[2] / "docs"
START_UP, FACTOR, MEMORY = 6.0, 1.5, 1.0
"""The bounds: FACTOR x the time of cp -r plus START_UP seconds; MEMORY GB plus twice the largest tensor."""

# What a person would write: load, subtract the mean of everything that writes to the stream, save.
PLAIN = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float16)
def center(p, dim):
    w = p.data.double()
    p.data = (w - w.mean(dim, keepdim=True)).to(p.dtype)
with torch.no_grad():
    center(model.gpt_neox.embed_in.weight, 1)
    for layer in model.gpt_neox.layers:
        for linear in (layer.attention.dense, layer.mlp.dense_4h_to_h):
            center(linear.weight, 0)
            center(linear.bias, 0)
model.save_pretrained(sys.argv[2], max_shard_size=int(sys.argv[3]))
"""


@dataclass(frozen=True)
class Run:
    """One process: wall seconds, peak resident GB (its children's peaks added), processor seconds, first line after."""

    seconds: float
    gigabytes: float
    processor: float
    first_line: float | None


def make_checkpoint(folder: Path, layers: int, width: int, shard: int) -> None:
    """Random float16 weights in the shape of GPT-NeoX, one shard in memory at a time."""
    import torch
    from safetensors.torch import save_file
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=width // 64,
        vocab_size=50432, dtype="float16",
    )  # fmt: skip
    config.architectures = ["GPTNeoXForCausalLM"]
    with torch.device("meta"):
        state = GPTNeoXForCausalLM(config).half().state_dict()
    config.save_pretrained(folder)
    groups: list[list[str]] = [[]]
    filled = 0
    for name, tensor in state.items():
        if groups[-1] and filled + tensor.nbytes > shard:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += tensor.nbytes
    names = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    for file, group in zip(names, groups, strict=True):
        values = {name: torch.empty(state[name].shape).normal_(std=0.02).half() for name in group}
        values |= {n: v + 1 for n, v in values.items() if "norm" in n and n.endswith("weight")}
        save_file(values, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, group in zip(names, groups, strict=True) for name in group}
    index = {"metadata": {"total_size": sum(t.nbytes for t in state.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def sizes(folder: Path) -> list[int]:
    """Bytes of every tensor, from the headers."""
    found = []
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as handle:
            header = json.loads(handle.read(int.from_bytes(handle.read(8), "little")))
        offsets = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
        found += [end - start for start, end in offsets]
    return found


def measure(command: list[str], out: Path) -> Run:
    """Run one way as a process of its own; ``out`` is removed before."""
    shutil.rmtree(out, ignore_errors=True)
    start = time.perf_counter()
    said: list[tuple[float, str]] = []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    peaks: dict[str, float] = {}
    done = threading.Event()
    threads = [
        threading.Thread(target=_listen, args=(process.stdout, start, said)),
        threading.Thread(target=_watch, args=(process.pid, peaks, done)),
    ]
    for thread in threads:
        thread.start()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    done.set()
    for thread in threads:
        thread.join()
    if os.waitstatus_to_exitcode(status) != 0:
        raise SystemExit("".join(line for _, line in said))
    if not peaks:  # Linux begins this count with the peak of whoever starts the process
        peaks[""] = usage.ru_maxrss / (1e6 if sys.platform != "darwin" else 1e9)
    return Run(seconds, sum(peaks.values()), usage.ru_utime + usage.ru_stime, said[0][0] if said else None)


def _watch(process: int, peaks: dict[str, float], done: threading.Event) -> None:
    """Note the peak memory (GB) of a process and of each of its children, where the system tells (Linux)."""
    while not done.wait(0.05):
        found = [str(process)]
        for listing in Path(f"/proc/{process}/task").glob("*/children"):
            with suppress(OSError):  # it has ended
                found += listing.read_text().split()
        for one in found:
            with suppress(OSError):
                for line in Path(f"/proc/{one}/status").read_text().splitlines():
                    if line.startswith("VmHWM:"):
                        peaks[one] = int(line.split()[1]) / 1e6


def _listen(stream: IO[bytes], start: float, said: list[tuple[float, str]]) -> None:
    """Note each line and when it came."""
    for line in stream:
        said.append((time.perf_counter() - start, line.decode(errors="replace")))


def ways(source: Path, out: Path, shard: int) -> dict[str, list[str]]:
    """Name -> command."""
    return {
        "cp -r": ["cp", "-r", str(source), str(out)],
        "normconvert": [sys.executable, "-m", "normconvert", "rmsnorm", str(source), str(out), "--no-verify"],
        "plain": [sys.executable, "-c", PLAIN, str(source), str(out), str(shard)],
    }


def run_all(source: Path, out: Path, shard: int, runs: int, say: Callable[[str], None]) -> dict[str, list[Run]]:
    """Each way once to warm up, then in turn, ``runs`` times; the plain way by itself.

    On a virtual machine memory that lay idle goes back to the host, and whoever takes it again waits for every page.
    """
    commands = ways(source, out, shard)
    for name in ("cp -r", "normconvert"):
        measure(commands[name], out)
    found: dict[str, list[Run]] = {name: [] for name in commands}
    for name in [*("cp -r", "normconvert") * runs, *("plain",) * min(3, runs)]:
        found[name].append(measure(commands[name], out))
        say(f"{name:12} {found[name][-1].seconds:6.1f} s  {found[name][-1].gigabytes:5.2f} GB")
    shutil.rmtree(out, ignore_errors=True)
    return found


def results(found: dict[str, list[Run]], source: Path) -> dict[str, Any]:
    """The figures as JSON-ready data, with the bounds and whether they hold."""
    tensors = sizes(source)
    largest = max(tensors)
    middle = {name: statistics.median(r.seconds for r in runs) for name, runs in found.items()}
    allowed = FACTOR * middle["cp -r"] + START_UP
    memory = MEMORY + 2 * largest / 1e9
    peak = max(r.gigabytes for r in found["normconvert"])
    return {
        "machine": {"cores": os.cpu_count(), "processor": platform.machine(), "system": platform.system()},
        "checkpoint": {
            "bytes": sum(tensors), "largest_tensor": largest, "shards": len(list(source.glob("*.safetensors"))),
        },
        "ways": {name: [asdict(r) for r in runs] for name, runs in found.items()},
        "bounds": {
            "seconds": allowed, "gigabytes": memory, "first_line": 2.0,
            "met": middle["normconvert"] <= allowed and peak <= memory
            and all((r.first_line or 0.0) <= 2.0 for r in found["normconvert"]),
        },
    }  # fmt: skip


def render(data: dict[str, Any]) -> str:
    """The section of docs/performance.md."""
    checkpoint, bounds = data["checkpoint"], data["bounds"]
    copying = statistics.median(r["seconds"] for r in data["ways"]["cp -r"])
    rows = []
    for name, runs in data["ways"].items():
        seconds, peaks = [r["seconds"] for r in runs], [r["gigabytes"] for r in runs]
        busy = statistics.median(r["processor"] / r["seconds"] for r in runs)
        first = [r["first_line"] for r in runs if r["first_line"] is not None]
        shown = f"{statistics.median(first):.1f} s" if first and name == "normconvert" else ""
        rows.append(
            f"| {name} | {statistics.median(seconds):.1f} s | {min(seconds):.1f} – {max(seconds):.1f} s "
            f"| {statistics.median(seconds) / copying:.1f} × | {max(peaks):.2f} GB | {busy:.1f} | {shown} |"
        )
    count = len(next(iter(data["ways"].values())))  # the plain way runs three times at most
    return "\n".join(
        [
            "## Conversion",
            "",
            "Written by `python -m tools.benchmarks.convert --write`.",
            "",
            f"A float16 checkpoint of {checkpoint['bytes'] / 1e9:.2f} GB in the shape of GPT-NeoX, in "
            f"{checkpoint['shards']} shards, random weights, largest tensor "
            f"{checkpoint['largest_tensor'] / 1e6:.0f} MB, page cache warm. The ways take turns, {count} runs each, "
            f"as whole processes, on {data['machine']['cores']} cores. *normconvert* is "
            "`normconvert rmsnorm SRC OUT --no-verify`; *plain* is `from_pretrained`, the same edits on the loaded "
            "weights, `save_pretrained`; it runs last, since the memory that it gives back is slow to get again. "
            "Memory counts the process and those it started. normconvert also computes the source's sha256 and looks "
            "for NaN and infinity in every weight.",
            "",
            "| | median | range | of cp | peak memory | cores busy | first line after |",
            "| --- | --- | --- | --- | --- | --- | --- |",
            *rows,
            "",
            f"The bounds: {FACTOR} × the time of `cp -r` plus {START_UP:.0f} s to start, here {bounds['seconds']:.1f} "
            f"s; {MEMORY:.0f} GB plus twice the largest tensor, here {bounds['gigabytes']:.2f} GB; the first line "
            f"after 2 s. By the medians they are {'met' if bounds['met'] else 'NOT met'}; that of the time is met "
            f"{_pairs(data)}.",
            "",
        ]
    )


def _pairs(data: dict[str, Any]) -> str:
    """In how many pairs of neighbouring runs the bound of the time holds."""
    pairs = list(zip(data["ways"]["cp -r"], data["ways"]["normconvert"], strict=True))
    kept = sum(own["seconds"] <= FACTOR * copy["seconds"] + START_UP for copy, own in pairs)
    return f"in {kept} of {len(pairs)} pairs of runs that follow each other"


def main() -> None:
    """Measure, print, and write the page if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=2560)
    parser.add_argument("--shard", type=int, default=10**9, help="bytes a shard")
    parser.add_argument("--make", type=Path, help="only make the checkpoint, here")
    parser.add_argument("--source", type=Path, help="one that was made before")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    if arguments.small:
        arguments.layers, arguments.width, arguments.shard = 2, 256, 2 * 10**7
    if arguments.make is not None:
        make_checkpoint(arguments.make, arguments.layers, arguments.width, arguments.shard)
        return
    with tempfile.TemporaryDirectory() as temporary:
        source, out = arguments.source or Path(temporary) / "neox", Path(temporary) / "out"
        if arguments.source is None:
            # by a process of its own: a child's peak memory starts at its parent's, which must stay small
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--make", str(source)], check=True)
        found = run_all(source, out, arguments.shard, arguments.runs, lambda line: print(line, flush=True))
        data = results(found, source)
    page = render(data)
    print(page)
    if arguments.write:
        from tools.benchmarks.models import SECTIONS
        from tools.docs.pages import write_section

        (DOCS / "results").mkdir(exist_ok=True)
        (DOCS / "results" / "convert.json").write_text(json.dumps(data, indent=1) + "\n")
        write_section(DOCS / "performance.md", "conversion", page, SECTIONS)


if __name__ == "__main__":
    main()
