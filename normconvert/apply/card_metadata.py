"""The front matter of a model card: the source's, key by key, with what the conversion changes about it.

The source's own text is kept as it is wherever a key stays, so nothing in it can be misread. What it measured is the
original's and not the new model's: ``model-index`` does not stay.
"""

from __future__ import annotations

import re

TASKS = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForSpeechSeq2Seq": "automatic-speech-recognition",
    "AutoModelForCTC": "automatic-speech-recognition",
    "AutoModelForAudioClassification": "audio-classification",
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForZeroShotImageClassification": "zero-shot-image-classification",
    "AutoModelForSemanticSegmentation": "image-segmentation",
    "AutoModelForImageSegmentation": "image-segmentation",
    "AutoModelForObjectDetection": "object-detection",
    "AutoModelForDepthEstimation": "depth-estimation",
    "AutoModelForVideoClassification": "video-classification",
}
"""Auto class -> the hub's name of what such a model does; the rest are left to the hub."""
DROPPED = ("base_model", "base_model_relation", "model-index", "tags", "library_name")
"""Keys that are written anew, or that are about the original alone."""
KEY = re.compile(r"""^(["']?)([\w.-]+)\1[ \t]*:(?=[ \t\r\n]|$)""")
# It begins and ends with no blank: a line of blanks that ends otherwise is not to be cut in every way there is.
TAG = re.compile(
    r"""^[ \t]*-[ \t]+(["']?)([^\s"'#\[\]{}:](?:[^"'#\n\[\]{}:]*[^\s"'#\[\]{}:])?)\1[ \t]*(?:#.*)?$""", re.MULTILINE
)
FLOW = re.compile(r"^tags[ \t]*:[ \t]*\[([^\[\]{}]*)\][ \t]*$", re.MULTILINE)


def metadata(front: str, base: str | None, library: str, method: str, task: str | None) -> str:
    """The YAML of a converted model's card.

    Args:
        front: the YAML of the source's card, empty for none.
        base: hub id of the source; None keeps what the source says of its own base.
        library: what loads the model, if the source does not say it.
        method: the conversion.
        task: the hub's name of what the model does, where the source does not say it.
    """
    parts = _parts(front)
    dropped = DROPPED if base else tuple(key for key in DROPPED if not key.startswith("base_model"))
    lines = "".join(text for key, text in parts if key not in dropped)
    known = dict(parts)
    lines += known.get("library_name", f"library_name: {library}\n")
    if task and "pipeline_tag" not in known:
        lines += f"pipeline_tag: {task}\n"
    names = dict.fromkeys([*_tags(known.get("tags", "")), "normconvert", method.replace(" ", "-")])
    lines += "tags:\n" + "".join(f"- {name}\n" for name in names)
    if base:
        lines += f"base_model: {base}\nbase_model_relation: finetune\n"
    return lines


def _parts(front: str) -> list[tuple[str, str]]:
    """Key and text of every entry, with the lines that belong to it; nothing if it is no plain mapping."""
    parts: list[tuple[str, list[str]]] = []
    for line in front.splitlines():
        if match := KEY.match(line):
            parts.append((match[2], [line]))
        elif not parts:
            if line.strip() and not line.startswith("#"):
                return []  # a mapping in braces, say: what cannot be told apart is not carried over
        elif line.strip() and line[0] not in " \t-#":
            return []
        else:
            parts[-1][1].append(line)
    return [(key, "".join(f"{line}\n" for line in lines)) for key, lines in parts]


def _tags(text: str) -> list[str]:
    """The tags of an entry ``tags:``, as a list below it or in brackets."""
    if flow := FLOW.search(text):
        return [name.strip().strip("\"'") for name in flow[1].split(",") if name.strip()]
    return [match[2].strip() for match in TAG.finditer(text)]
