"""What rotating is good for: perplexity of trained models with weights and activations in few bits.

    python tools/benchmarks/quantisation.py [--models demo:gpt2 FOLDER ...] [--text FILE] [--gguf FILE.gguf]

Round to nearest, simulated in float32: weights by a scale for each row, activations for each token, both symmetric, in
every linear map but the output head. The original beside the same model rotated, and rotated with its values, by
Hadamard matrices of three seeds. Then what storing both in 16 bits costs: logits of the stored weights beside those
that the original gives in float64. Writes docs/quantisation.md.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

PAGE = ROOT / "docs" / "quantisation.md"
BITS = {"float": (0, 0), "W8A8": (8, 8), "W4A8": (4, 8), "W4A4": (4, 4), "W16A6": (0, 6), "W16A4": (0, 4)}
"""Setting -> bits of weights and of activations; 0: as they are."""
SEEDS = (0, 1, 2)
WINDOWS, LENGTH = 8, 256
STORED = {"bfloat16": torch.bfloat16, "float16": torch.float16}
ROUNDED = (
    "Read from a GGUF file in which its weights already had few bits: the original loses little where they are rounded "
    "to few once more, on the grid that they came from, and a rotated model starts from another."
)
"""Said of a model whose weights were quantised before, by whoever published it."""


def main() -> None:
    """Parse the command line, measure, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["demo:gpt2"])
    parser.add_argument("--gguf", nargs="*", type=Path, default=[], help="language models in GGUF files")
    parser.add_argument("--text", type=Path, help="what is predicted; default: the embedded held-out text")
    parser.add_argument("--out", type=Path, default=PAGE)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        models = dict.fromkeys(options.models, "") | {str(_from_gguf(f, Path(folder))): ROUNDED for f in options.gguf}
        parts = [part for model in models.items() for part in (measured(*model, options.text, Path(folder)), "")]
    settings = ", ".join(list(BITS)[1:])
    lines = [
        "# Quantisation", "",
        "Rotated models ([`normconvert rotate`](commands.md)) compute the same, and their large single channels are",
        "spread over all: where a model has such, few bits lose less; each table shows how much. Perplexity by",
        f"round-to-nearest, in float32 ({settings}, simulated): one scale for each row of a weight and for each "
        "token,",
        "all linear maps but the output head. Rotated: the mean over three seeds, with the smallest and the largest.",
        "",
        "A second table shows what a rotation costs where the result is stored in 16 bits: all weights rounded to the",
        "dtype, run in float32, and the logits beside those that the original's own weights give in float64.",
        "",
        f"Made by `python tools/benchmarks/quantisation.py` with torch {torch.__version__.split('+')[0]}.", "", *parts,
    ]  # fmt: skip
    options.out.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def measured(reference: str, note: str, text: Path | None, folder: Path) -> str:
    """The table of one model, with a note before it."""
    import normconvert
    from normconvert.sources import open_source

    source = open_source(reference)
    original = source.load(dtype=torch.float32)
    ids = _tokens(source, text)
    truth = _logits(copy.deepcopy(original).double(), ids)
    columns: dict[str, list[dict[str, float]]] = {"original": [perplexities(original, ids)]}
    costs = {"original": [stored(original, ids, truth)]}
    print(f"{reference}: {columns['original'][0]}", file=sys.stderr, flush=True)
    notes = [note] if note else []
    for label, values in (("rotated", False), ("rotated, values too", True)):
        for seed in SEEDS:
            out = folder / f"{Path(reference).name.replace(':', '-')}-{seed}-{values}"
            report = normconvert.convert(reference, out, "rotate", seed=seed, values=values, verify_level="quick")
            none = any("no values are rotated" in note for note in report.notes)
            if none:
                notes += ["Queries, keys and values are one tensor here, so values stay as they are."]
                break
            model = normconvert.load(out, dtype=torch.float32)
            columns.setdefault(label, []).append(perplexities(model, ids))
            print(f"{reference}, {label}, seed {seed}: {columns[label][-1]}", file=sys.stderr, flush=True)
            if not values:
                costs.setdefault(label, []).append(stored(model, ids, truth))
                print(f"{reference}, stored, seed {seed}: {costs[label][-1]}", file=sys.stderr, flush=True)
    rows = [f"## {Path(reference).name}", "", f"{ids.numel():,} tokens. {' '.join(notes)}".rstrip(), ""]
    rows += [f"| | {' | '.join(BITS)} |", "| --- |" + " --- |" * len(BITS)]
    for label, found in columns.items():
        cells = [_cell([one[name] for one in found]) for name in BITS]
        rows.append(f"| {label} | {' | '.join(cells)} |")
        print(rows[-1], flush=True)
    rows += ["", f"Stored in 16 bits; in float64 the logits have a standard deviation of {float(truth.std()):.3g}.", ""]
    rows += ["| stored in | | largest difference | root mean square | perplexity |", "| --- |" + " --- |" * 4]
    for name in STORED:
        for label, lost in costs.items():
            figures = list(zip(*(one[name] for one in lost), strict=True))
            cells = [_cell(list(values), digits) for values, digits in zip(figures, (4, 5, 3), strict=True)]
            rows.append(f"| {name} | {label} | {' | '.join(cells)} |")
            print(rows[-1], flush=True)
    return "\n".join(rows)


def _cell(values: list[float], digits: int = 2) -> str:
    mean, least, most = statistics.mean(values), min(values), max(values)
    shown = f"{mean:,.{digits}f}" if mean < 100 else f"{mean:,.0f}"
    return f"{shown} ({least:,.{digits}f} to {most:,.{digits}f})" if most - least > 0.5 * 0.1**digits else shown


def stored(model: nn.Module, ids: Tensor, truth: Tensor) -> dict[str, tuple[float, float, float]]:
    """Dtype -> the largest and the mean (root mean square) difference of the logits from ``truth``; the perplexity.

    Args:
        model: in float32; its weights are rounded to the dtype, and it runs in float32.
        ids: (windows, tokens).
        truth: logits of the original in float64, (windows, tokens, vocabulary).
    """
    found = {}
    for name, dtype in STORED.items():
        rounded_model = copy.deepcopy(model).to(dtype).float()
        most = squares = loss = 0.0
        # Window by window: the differences of all of them are gigabytes.
        for row, right in zip(ids, truth, strict=True):
            logits = _logits(rounded_model, row[None])[0]
            most = max(most, float((logits - right).abs().max()))
            squares += float((logits - right).double().square().mean()) / len(ids)
            loss += float(nn.functional.cross_entropy(logits[:-1], row[1:])) / len(ids)
        found[name] = most, squares**0.5, math.exp(loss)
    return found


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    """(windows, tokens, vocabulary), in float32 whatever the model runs in: as many digits as are shown."""
    with torch.no_grad():
        return torch.cat([model(input_ids=row[None]).logits.float() for row in ids])


def perplexities(model: nn.Module, ids: Tensor) -> dict[str, float]:
    """Setting -> perplexity."""
    found = {}
    for name, (weights, activations) in BITS.items():
        with quantised(model, weights, activations):
            found[name] = math.exp(_loss(model, ids))
    return found


@contextmanager
def quantised(model: Any, weights: int, activations: int) -> Iterator[None]:
    """While open, the linear maps of a model but its output head have few bits."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    before: list[tuple[Tensor, Tensor]] = []
    with ExitStack() as stack:
        for module in model.modules():
            if not isinstance(module, (nn.Linear, Conv1D)) or module is head:
                continue
            if weights:
                before.append((module.weight.data, module.weight.data.clone()))
                # Conv1D stores its rows as columns.
                module.weight.data.copy_(rounded(module.weight.data, weights, 0 if isinstance(module, Conv1D) else 1))
            if activations:
                stack.enter_context(module.register_forward_pre_hook(_rounding(activations)))
        yield
    for weight, value in before:
        weight.copy_(value)


def _rounding(bits: int) -> Any:
    return lambda module, args: (rounded(args[0], bits, -1), *args[1:])


def rounded(x: Tensor, bits: int, dim: int) -> Tensor:
    """The nearest of 2^bits - 1 equidistant numbers, symmetric about zero, with one scale along ``dim``."""
    most = 2 ** (bits - 1) - 1
    scale = x.abs().amax(dim, keepdim=True).clamp_min(1e-12) / most
    return (x / scale).round().clamp(-most, most) * scale


def _loss(model: nn.Module, ids: Tensor) -> float:
    total = 0.0
    with torch.no_grad():
        for row in ids:
            logits = model(input_ids=row[None]).logits[0, :-1].float()
            total += float(nn.functional.cross_entropy(logits, row[1:]))
    return total / len(ids)


def _tokens(source: Any, text: Path | None) -> Tensor:
    """(windows, tokens): the text as this model reads it."""
    from normconvert.files.embedded import held_out_text
    from normconvert.tuning.data.text import windows_of
    from normconvert.tuning.data.wanted import wanted_by

    wanted = wanted_by(source, source.skeleton())
    words = text.read_text(encoding="utf-8") if text is not None else held_out_text()
    return windows_of("text", [words], wanted, LENGTH).columns["input_ids"][:WINDOWS]


def _from_gguf(file: Path, folder: Path) -> Path:
    """A model of a GGUF file as transformers saves it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = folder / file.stem
    options = {"gguf_file": file.name}
    read = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **options)
    config = copy.deepcopy(read.config)
    vars(config).pop("quantization_config", None)
    # Of its own: what was read from such a file does not let itself be saved.
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(file.parent, **options).save_pretrained(out)
    return out


if __name__ == "__main__":
    main()
