"""Exported models in an engine: torch, and onnxruntime with the original and the converted file; one run, side by side.

    python -m tools.benchmarks.engines [--small] [--threads 2] [--rounds 15] [--models gpt2 resnet50 …] [--write]

The checkpoints are made here: the shapes of well-known models with random, perturbed weights. Each is converted, both
are exported for each target, and all versions take turns, round by round, so that whatever else the machine does hits
all alike. A cell is the median time of one call in milliseconds; a ratio the median over rounds, with the quartiles.
``--write`` writes docs/performance.md.

OpenVINO is timed where it is installed, with the file that is for it.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import normconvert
from normconvert.exporting.export import export
from normconvert.exporting.request import TARGETS
from normconvert.sources.converted import load_opened, open_any
from tests.support.perturb import perturb
from tools.docs.pages import write_section

PAGE = Path(__file__).parents[2] / "docs" / "performance.md"
BATCHES = (1, 8)
F32 = {"INFERENCE_PRECISION_HINT": "f32"}
Run = Callable[[Mapping[str, Tensor]], object]
Times = dict[tuple[str, str, int], list[float]]


@dataclass(frozen=True)
class Subject:
    """One model: how it is made and converted, and an input of so many samples."""

    make: Callable[[bool], nn.Module]
    method: str
    inputs: Callable[[int], dict[str, Tensor]]


def _transformers(name: str, **sizes: Any) -> Callable[[bool], nn.Module]:
    def make(small: bool) -> nn.Module:
        import transformers

        kind = getattr(transformers, name)
        depth = {key: 2 for key in sizes if "layer" in key and isinstance(sizes[key], int)} if small else {}
        model: nn.Module = kind(kind.config_class(**{**sizes, **depth}))
        return model

    return make


def _timm(name: str) -> Callable[[bool], nn.Module]:
    def make(small: bool) -> nn.Module:
        import timm

        model: nn.Module = timm.create_model(name, pretrained=False)
        return model

    return make


def _text(rows: int) -> dict[str, Tensor]:
    ids = torch.randint(5, 1000, (rows, 128))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _sound(rows: int) -> dict[str, Tensor]:
    return {"input_features": torch.randn(rows, 80, 3000), "decoder_input_ids": torch.randint(5, 1000, (rows, 16))}


SUBJECTS: dict[str, Subject] = {
    "gpt2": Subject(_transformers("GPT2LMHeadModel", n_layer=12), "rmsnorm", _text),
    "bert-base": Subject(_transformers("BertModel", num_hidden_layers=12), "rmsnorm", _text),
    "vit_base_patch16_224": Subject(
        _timm("vit_base_patch16_224"), "rmsnorm", lambda n: {"x": torch.randn(n, 3, 224, 224)}
    ),
    "whisper-base": Subject(
        _transformers(
            "WhisperForConditionalGeneration", d_model=512, encoder_layers=6, decoder_layers=6,
            encoder_attention_heads=8, decoder_attention_heads=8, encoder_ffn_dim=2048, decoder_ffn_dim=2048,
        ),
        "rmsnorm", _sound,
    ),
    "resnet50": Subject(_timm("resnet50"), "fuse-bn", lambda n: {"x": torch.randn(n, 3, 224, 224)}),
    "mobilenetv3_large_100": Subject(
        _timm("mobilenetv3_large_100"), "fuse-bn", lambda n: {"x": torch.randn(n, 3, 224, 224)}
    ),
}  # fmt: skip


def main() -> None:
    """Time every model; print the table, or write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--small", action="store_true", help="fewer layers, to try it")
    parser.add_argument("--write", action="store_true", help="write docs/performance.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: dict[str, Times] = {}
    for name in options.models:
        rows[name] = timed(name, options.small, options.threads, options.rounds)
        lines = table(rows, options.threads)
        # After each: a run of all takes most of an hour, and what is measured is kept.
        if options.write:
            from tools.benchmarks.models import SECTIONS

            write_section(PAGE, "engines", "\n".join(lines), (*SECTIONS, "engines"))
        print(lines[-1], flush=True)
    print("\n".join(lines))


def timed(name: str, small: bool, threads: int, rounds: int) -> Times:
    """Engine, version and batch -> milliseconds of each round."""
    subject = SUBJECTS[name]
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        source, out = folder / "original", folder / "converted"
        _save(perturb(subject.make(small).eval()), name, source)
        reference = f"{source}"
        normconvert.convert(reference, out, subject.method, verify=False)
        calls: dict[tuple[str, str], Run] = {}
        for version, path in (("original", source), ("converted", out)):
            calls["torch", version] = _in_torch(load_opened(open_any(path)).eval())
            for target in TARGETS:
                file = folder / f"{version}-{target}.onnx"
                export(path, file, target=target, inputs=list(subject.inputs(1)))
                engine = "OpenVINO" if target == "openvino" else f"onnxruntime ({target})"
                run = _in_openvino(file, threads) if target == "openvino" else _in_onnxruntime(file, threads)
                if run is not None:
                    calls[engine, version] = run
        return {
            (*which, batch): milliseconds
            for batch in BATCHES
            for which, milliseconds in _rounds(calls, subject.inputs(batch), rounds).items()
        }


def _save(model: Any, name: str, folder: Path) -> None:
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder)
        return
    import timm

    timm.models.save_for_hf(model, folder, model_config={"num_classes": model.num_classes})


def _in_torch(model: nn.Module) -> Run:
    def run(inputs: Mapping[str, Tensor]) -> object:
        with torch.inference_mode():
            return model(**inputs)

    return run


def _in_onnxruntime(file: Path, threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    names = {one.name for one in session.get_inputs()}
    return lambda inputs: session.run(None, {k: v.numpy() for k, v in inputs.items() if k in names})


def _in_openvino(file: Path, threads: int) -> Run | None:
    """The file in OpenVINO; None where it is not installed."""
    if importlib.util.find_spec("openvino") is None:
        return None
    import openvino

    model = openvino.compile_model(str(file), "CPU", {"INFERENCE_NUM_THREADS": threads, **F32})
    names = {name for one in model.inputs for name in one.names}
    return lambda inputs: model({k: v.numpy() for k, v in inputs.items() if k in names})


def _rounds(
    calls: Mapping[tuple[str, str], Run], inputs: Mapping[str, Tensor], rounds: int
) -> dict[tuple[str, str], list[float]]:
    times: dict[tuple[str, str], list[float]] = {which: [] for which in calls}
    for number in range(rounds + 2):
        for which, call in calls.items():
            start = time.perf_counter()
            call(inputs)
            if number > 1:
                times[which].append(1000 * (time.perf_counter() - start))
    return times


def table(rows: Mapping[str, Times], threads: int) -> list[str]:
    """The section: one row for each engine that runs a model."""
    import onnxruntime

    missing = "" if importlib.util.find_spec("openvino") else " OpenVINO was not installed, and is not measured."
    engines = f"torch {torch.__version__}, onnxruntime {onnxruntime.__version__}"
    if not missing:
        import openvino

        engines += f", OpenVINO {openvino.__version__.split('-')[0]}"
    lines = [
        "## Exported: in an engine", "",
        f"`python -m tools.benchmarks.engines`: float32 on a CPU with {threads} threads, {engines}. Median "
        "milliseconds of a call of the original and the converted model; ×: converted by original, the median over "
        "rounds in which all take turns, with the quartiles; other work on the machine hits all alike, so read these. "
        "Texts of 128 tokens, images of 224², 30 s of sound."
        f"{missing}", "",
        "| model | engine | " + " | ".join(f"batch {b} | ×" for b in BATCHES) + " |", "| --- | --- | " + "---: | " * 4,
    ]  # fmt: skip
    for name, found in rows.items():
        for engine in dict.fromkeys(engine for engine, _, _ in found):
            cells = []
            for batch in BATCHES:
                before, after = found[engine, "original", batch], found[engine, "converted", batch]
                ratios = [b / a for a, b in zip(before, after, strict=True)]
                low, middle, high = statistics.quantiles(ratios, n=4)
                cells.append(f"{statistics.median(before):.1f} → {statistics.median(after):.1f}")
                cells.append(f"{middle:.3f} ({low:.3f}–{high:.3f})")
            lines.append(f"| {name} | {engine} | {' | '.join(cells)} |")
    return [line.rstrip() for line in lines]


if __name__ == "__main__":
    main()
