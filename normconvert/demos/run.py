"""``normconvert demo``: convert the embedded models, then let the originals and the converted ones do the same work."""

from __future__ import annotations

from normconvert.files.user_paths import user_path
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normconvert.report.screen import Done, Screen

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

    from normconvert.result import Report

PROMPT = "And God said"
TOKENS = 60


@dataclass(frozen=True)
class Continuation:
    """The same prompt continued greedily by the original and by the converted model."""

    prompt: str
    original: str
    converted: str
    tokens: int
    same: bool


@dataclass(frozen=True)
class Accuracy:
    """Handwritten digits recognised by the original and by the converted model."""

    images: int
    original: int
    converted: int
    same_answers: int


def run_demo(
    screen: Screen,
    out: Path | None = None,
    *,
    overwrite: bool = False,
    measure: Callable[[str, str], dict[str, Any]] | None = None,
) -> Done:
    """Convert ``demo:gpt2`` and ``demo:vit`` into folders of ``out`` and compare what the models do.

    Args:
        screen: shows the stages.
        out: where to keep the converted models; None for a temporary folder.
        overwrite: replace folders that exist.
        measure: called with an original and its conversion; what it returns becomes a part of that report's document.

    Returns:
        Exit status 1 if a model, once converted, does anything else than before.

    Raises:
        NormConvertError: as :func:`normconvert.convert` does.
    """
    screen.begin("converting demo:gpt2 and demo:vit")  # before anything heavy is imported
    screen.stages("demo:gpt2")("open")
    with nullcontext(str(out)) if out is not None else tempfile.TemporaryDirectory(prefix="normconvert-") as folder:
        place = user_path(folder)
        language = _convert(screen, "gpt2", place, overwrite)
        screen.say("generating text")
        continuation = continue_text(place / "gpt2")
        vision = _convert(screen, "vit", place, overwrite)
        screen.say("reading digits")
        accuracy = read_digits(place / "vit")
        found = [measure(f"demo:{n}", str(place / n)) if measure is not None else {} for n in ("gpt2", "vit")]
    good = continuation.same and accuracy.same_answers == accuracy.images
    kept = {} if out is not None else {"out": None}
    document = {
        "command": "demo",
        "reports": [language.to_json() | found[0] | kept, vision.to_json() | found[1] | kept],
        "text": asdict(continuation),
        "digits": asdict(accuracy),
    }

    def show(console: Console) -> None:
        _show(console, (language, vision), continuation, accuracy, kept=out is not None)

    return Done(document, show, 0 if good else 1)


def continue_text(converted: Path, prompt: str = PROMPT, tokens: int = TOKENS) -> Continuation:
    """Let ``demo:gpt2`` and its conversion continue ``prompt`` by ``tokens`` tokens, greedily, in float32."""
    from normconvert import load
    from normconvert.sources import open_source

    source = open_source("demo:gpt2")
    tokenizer: Any = source.tokenizer()
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = []
    for model in (source.load(), load(converted)):
        generated = model.generate(  # type: ignore[operator]
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"],
            do_sample=False, no_repeat_ngram_size=3, min_new_tokens=tokens, max_new_tokens=tokens,
            pad_token_id=tokenizer.eos_token_id or 0,
        )  # fmt: skip
        ids.append(generated[0].tolist())
    texts = [tokenizer.decode(some, skip_special_tokens=True) for some in ids]
    return Continuation(prompt, texts[0], texts[1], tokens, same=ids[0] == ids[1])


def read_digits(converted: Path) -> Accuracy:
    """Let ``demo:vit`` and its conversion read the 360 digits that it has not seen in training."""
    import torch

    from normconvert import load
    from normconvert.files.embedded import held_out_digits
    from normconvert.sources import open_source

    pixels, labels = held_out_digits()
    images = pixels.to(torch.float32)[:, None] / 16 * 2 - 1  # the scaling of the training

    def answers(model: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            result: torch.Tensor = model(images).argmax(-1)
        return result

    a, b = answers(open_source("demo:vit").load()), answers(load(converted))
    right = [int((some == labels).sum()) for some in (a, b)]
    return Accuracy(len(labels), right[0], right[1], int((a == b).sum()))


def _convert(screen: Screen, name: str, place: Path, overwrite: bool) -> Report:
    reference, folder = f"demo:{name}", place / name
    stage = screen.stages(reference, str(folder))
    stage("open")
    from normconvert import convert

    report = convert(reference, folder, overwrite=overwrite, progress=screen.progress, stage=stage)
    screen.written.append(str(folder))
    return report


def _show(
    console: Console,
    reports: tuple[Report, Report],
    continuation: Continuation,
    accuracy: Accuracy,
    *,
    kept: bool,
) -> None:
    from rich.padding import Padding
    from rich.rule import Rule
    from rich.text import Text

    from normconvert.report.console import FAINT, HEAD, agrees, show_summary
    from normconvert.wording.words import percent

    headings = ("A language model that has read the King James Bible", "A vision transformer that reads digits")
    for heading, report in zip(headings, reports, strict=True):
        console.print(Rule(Text(heading, HEAD), style=FAINT, align="left"))
        show_summary(console, report, kept=kept)
        console.print()
        if report is reports[0]:
            same = f"the same {continuation.tokens} tokens" if continuation.same else "the two differ"
            sides = ("original, LayerNorm", continuation.original), ("converted, RMSNorm", continuation.converted)
            for label, text in sides:
                told = Text.assemble((continuation.prompt, HEAD), text.removeprefix(continuation.prompt))
                console.print(Padding(Text(label, FAINT), (0, 0, 0, 2)))
                console.print(Padding(told, (0, 4, 1, 4)))
            console.print(Padding(agrees(continuation.same, same), (0, 0, 1, 2)))
    n = accuracy.images
    for label, right in (("original, LayerNorm", accuracy.original), ("converted, RMSNorm", accuracy.converted)):
        line = Text.assemble(
            (f"{label:21}", FAINT), f"{right} of {n} digits right ({percent(right / n)}); none seen in training"
        )
        console.print(Padding(line, (0, 0, 0, 2)))
    same = "the same answer to every digit" if accuracy.same_answers == n else f"{accuracy.same_answers} answers alike"
    console.print(Padding(agrees(accuracy.same_answers == n, same), (1, 0, 1, 2)))
    if not kept:
        console.print(Padding(Text("keep the converted models with: normconvert demo OUT", FAINT), (0, 0, 0, 2)))
