"""The census of exports: which models become ONNX files and torch.export programs that compute what torch computes?

Each model is built small with perturbed float32 weights, exported as `normconvert export` does it, and the file run in
onnxruntime (a program in torch) at other sizes and with masks; decoders also with a past, encoder-decoders in parts.

    nice python -m tools.census.exports --minutes 30      # goes on where it stopped
    python -m tools.census.exports --write                # the section of docs/coverage.md
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

PAGE = ROOT / "docs" / "coverage.md"
WORK = ROOT / "build" / "exports.jsonl"
HEADING = "## Exports"
ALLOWED = 1e-5
"""Relative error in float32."""
FORMS = ("onnx", "pt2", "past", "folder")
SAID = {"onnx": "ONNX", "pt2": "torch.export", "past": "ONNX with past", "folder": "encoder and decoder"}

TRANSFORMERS = """
bert gpt2 llama bart t5 whisper clip distilbert segformer llava mbart roberta albert electra deberta deberta-v2
mpnet xlm-roberta camembert opt gpt_neo gpt_neox gptj bloom mistral qwen2 qwen3 gemma gemma2 gemma3_text phi phi3
falcon stablelm starcoder2 olmo olmo2 cohere granite mamba vit deit beit dinov2 swin convnext convnextv2 resnet
mobilevit mobilenet_v2 poolformer pvt levit dpt glpn detr yolos vilt siglip blip align clipseg owlvit wav2vec2
hubert wavlm data2vec-audio audio-spectrogram-transformer speech_to_text pegasus marian blenderbot m2m_100 mt5
longt5 led prophetnet layoutlm layoutlmv3 lxmert funnel fnet nystromformer convbert roformer esm vit_mae videomae
timesformer smollm3 mixtral qwen2_moe nemotron persimmon codegen xglm biogpt
"""
TIMM = """
resnet18 resnet50 mobilenetv3_small_100 mobilenetv2_100 efficientnet_b0 vit_tiny_patch16_224 vit_small_patch16_224
deit_tiny_patch16_224 swin_tiny_patch4_window7_224 convnext_tiny regnety_002 densenet121 mixer_s16_224 mobilevit_xxs
edgenext_xx_small levit_128 pit_ti_224 cait_xxs24_224 xcit_nano_12_p16_224 maxvit_tiny_rw_224 coatnet_nano_rw_224
efficientformer_l1 poolformer_s12 pvt_v2_b0 ghostnet_100 rexnet_100 dla34 repvgg_a0 resnext50_32x4d seresnet18
eva02_tiny_patch14_224 beit_base_patch16_224 fastvit_t8 tiny_vit_5m_224 mobileone_s0 nfnet_l0 hrnet_w18_small vgg11
inception_v3 xception41 convmixer_768_32 twins_pcpvt_small
"""

Row = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    """Sweep what is left, then print the summary."""
    from tools.census.sections import write_under
    from tools.census.sweep import options, read_rows, sweep

    arguments = options(str(__doc__), WORK).parse_args(argv)
    rows = read_rows(arguments.work)
    if arguments.write:
        write_under(PAGE, HEADING, section(list(rows.values())))
        return 0
    # One of the other library after every second: a sweep that is stopped has seen some of both.
    keys = [("transformers", name) for name in TRANSFORMERS.split()]
    for number, name in enumerate(TIMM.split()):
        keys.insert(min(3 * number + 2, len(keys)), ("timm", name))
    keys = [key for key in keys if not arguments.only or key[1] in arguments.only]
    sweep(arguments, keys, rows, exports_of, json.dumps)
    print(summary(list(rows.values())))
    return 0


def exports_of(library: str, name: str) -> Row:
    """Export one model in each form that it has."""
    from tools.census.zoo.timm_zoo import timm_case
    from tools.census.zoo.transformers_zoo import transformers_case

    case, _ = (transformers_case if library == "transformers" else timm_case)(name, 0)
    model = case.build()
    row: Row = {"model_class": case.model_class}
    for form in FORMS:
        found = one_form(model, form, case.model_class)
        if found is not None:
            row[form] = found
    return row


def one_form(model: Any, form: str, name: str) -> Row | None:
    """The error of the files, what may vary in them, or why there are none; None if the model has no such form."""
    from normconvert.errors import InputError, NormConvertError
    from normconvert.exporting.export import export_model
    from normconvert.exporting.request import Export
    from normconvert.exporting.second_engine import is_installed

    file = {"pt2": "model.pt2", "folder": "folder"}.get(form, "model.onnx")
    with tempfile.TemporaryDirectory() as folder:
        try:
            report = export_model(model, Export(name, Path(folder) / file, with_past=form == "past"))
        except InputError as error:
            return None if form in ("past", "folder") else {"failure": str(error)}
        except NormConvertError as error:
            return {"failure": str(error).replace(f"{name}: ", "", 1)[:200]}
    varies = sorted({what for one in report.files for what in one.varies})
    row = {"error": report.error, "checks": min(one.checks for one in report.files), "varies": varies}
    if form != "pt2" and is_installed():
        row["openvino"] = all("openvino" in one.engines for one in report.files)
        row["notes"] = [note for note in report.notes if "OpenVINO" in note]
    return row


def outcome(found: Row | None) -> str:
    """One cell of the table."""
    if found is None:
        return ""
    if "failure" in found:
        return "refused"
    return f"{found['error']:.1e}" if found["error"] <= ALLOWED else f"**{found['error']:.1e}**"


def summary(rows: list[Row]) -> str:
    """One line: models, and how many of each form are within the limit."""
    counts = Counter(
        (form, row[form].get("error", 1) <= ALLOWED) for row in rows for form in FORMS if row.get(form) is not None
    )
    libraries = Counter(row["library"] for row in rows if any(form in row for form in FORMS))
    models = f"{libraries['transformers']} transformers types and {libraries['timm']} timm models"
    second = [row[form]["openvino"] for row in rows for form in FORMS if "openvino" in (row.get(form) or {})]
    there = [f"of {len(second)} ONNX files that were run in OpenVINO as well {sum(second)}"] if second else []
    forms = [f"{SAID[f]} {counts[f, True]} of {counts[f, True] + counts[f, False]}" for f in FORMS]
    return f"{models}; within {ALLOWED:g}: {', '.join([*forms, *there])}"


def section(rows: list[Row]) -> list[str]:
    """The section of docs/coverage.md."""
    lines = [
        HEADING, "", f"Float32, small models with perturbed weights: {summary(rows)}.", "",
        "`python -m tools.census.exports`: exported as `normconvert export` does, and run (ONNX files in onnxruntime)",
        "with other batches, lengths, image sizes and padding masks where they may vary. Figures are the largest",
        f"relative errors; a larger one than {ALLOWED:g} is bold. *Inputs* counts those of each file.", "",
        f"| model | {' | '.join(SAID[form] for form in FORMS)} | inputs | may vary |", "| --- " * 7 + "|",
    ]  # fmt: skip
    done = [row for row in rows if any(form in row for form in FORMS)]
    for row in sorted(done, key=lambda row: (row["library"] != "transformers", row["name"])):
        varies = sorted({what for form in FORMS for what in (row.get(form) or {}).get("varies", ())})
        checks = min((row[form]["checks"] for form in FORMS if "checks" in (row.get(form) or {})), default=0)
        cells = " | ".join(outcome(row.get(form)) for form in FORMS)
        lines.append(f"| `{row['name']}` | {cells} | {checks or ''} | {', '.join(varies)} |")
    refused = [
        f"- `{row['name']}`, {SAID[form]}: {row[form]['failure']}"
        for row in done for form in FORMS if "failure" in (row.get(form) or {})
    ]  # fmt: skip
    refused += [
        f"- `{row['name']}`, {SAID[form]}: {note}"
        for row in done for form in FORMS for note in (row.get(form) or {}).get("notes", ())
    ]  # fmt: skip
    refused += [f"- `{row['name']}`: not built: {row['failure']}" for row in rows if "failure" in row]
    return [*lines, "", "What was refused, and why:", "", *refused, ""] if refused else [*lines, ""]


if __name__ == "__main__":
    sys.exit(main())
