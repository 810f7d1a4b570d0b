"""The examples of the documentation, run: ``$ normconvert …`` in an indented block, and the output that follows it.

    python tools/docs/command_output.py            # run them all and write what they say into the pages
    python tools/docs/command_output.py --check    # only compare; status 1 if a page says something else
    python tools/docs/command_output.py --only bench    # measure again what a benchmark says

Examples run in the order of the pages, in one scratch folder, so that a later one finds what an earlier one wrote.
Figures that depend on the machine (times, rounding errors) are not compared; words, counts and verdicts are. An output
that begins with ``…`` is a part of what the command says. Seconds are left out. A command without an output, or one
that needs a package which is not here, is not run; ``?`` stands for an output to be written.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from normconvert import convert  # noqa: E402

PAGES = ("../README.md", "index.md", "commands.md", "recipes.md", "ci.md")
PROMPT, INDENT, ELLIPSIS = "$ normconvert ", "    ", "…"
BEGIN, FINISH = "<!-- options: tools/docs/command_output.py -->", "<!-- end of options -->"
CONVERSIONS = ("rmsnorm", "crmsnorm", "fuse-bn")
NEEDS = {".onnx": "onnxscript"}
SECONDS = re.compile(r"^(?:  )?seconds +\w.*\n(?: {14,}(?:\w+ )?\d+\.\d(?: · .*)?\n)*", re.MULTILINE)
"""The line of times, and what of it goes on in the next."""
FIGURES = (
    (re.compile(r"[-+±]?\b\d+(\.\d+)?e[-+]\d+|[-+±]?\b\d+\.\d+"), "#"),  # 5.8e-16, 0.982: no counts
    (re.compile(r"\b(\d+ min )?\d+ (×|ms|s|B|kB|MB)(?=\W|$)"), r"# \2"),
    (re.compile(r"\b(KL|loss|after|in) -?\d+(?=\W|$)"), r"\1 #"),  # a figure that happens to be a whole number
    (re.compile("[▁▂▃▄▅▆▇█]+"), "▁"),
    (re.compile(r"at (\w+\.)+\d+$"), "at #"),
    (re.compile("─+"), "─"),
    (re.compile(" {2,}"), "  "),  # columns are as wide as their figures
)
"""What differs from machine to machine -> what is compared instead."""


@dataclass(frozen=True)
class Example:
    """A command in a page and what follows it.

    Attributes:
        page: name of the file in ``docs/``.
        line: index of the command's line.
        command: without the prompt, so ``rmsnorm demo:gpt2 out``.
        said: lines of the output, without the indent.
    """

    page: str
    line: int
    command: str
    said: tuple[str, ...]

    @property
    def is_part(self) -> bool:
        """Whether the page shows only a part of the output."""
        return self.said[:1] == (ELLIPSIS,)

    @property
    def varies(self) -> bool:
        """Whether the output is of measurements, whose very lines differ from run to run; it is written once."""
        return self.command.startswith("bench") and self.said != ("?",)

    @property
    def can_run(self) -> bool:
        """Whether everything is here that the command needs."""
        return all(find_spec(name) for word, name in NEEDS.items() if word in self.command)


def examples(page: Path) -> Iterator[Example]:
    """The examples of a page that show an output."""
    lines = page.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        if not line.startswith(INDENT + PROMPT):
            continue
        following = itertools.takewhile(
            lambda text: not text or (text.startswith(INDENT) and not text.startswith(INDENT + "$")),
            lines[number + 1 :],
        )
        said = [text[len(INDENT) :] for text in following]
        while said and not said[-1]:
            said.pop()
        if said:
            yield Example(page.name, number, line.removeprefix(INDENT + PROMPT), tuple(said))


def execute(command: str) -> list[str]:
    """What ``normconvert COMMAND`` says in the current folder: standard output, and the error if there is one."""
    from normconvert.cli import run

    prepare(command)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        run(shlex.split(command))
    said = out.getvalue()
    if "error: " in err.getvalue():
        said += err.getvalue()[err.getvalue().index("error: ") :]
    return lines_of(said)


def lines_of(said: str) -> list[str]:
    """The lines of an output as a page shows them: without seconds, and without empty lines around it."""
    return [line.rstrip() for line in SECONDS.sub("", said).strip("\n").splitlines()]


def page_says(page: str, command: str) -> list[str]:
    """What a page shows for a command, where it does so first."""
    return next(list(example.said) for example in examples(ROOT / "docs" / page) if example.command == command)


def prepare(command: str) -> None:
    """Make what a command reads and no earlier one has written: the small models, the tampered outputs."""
    name, *words = shlex.split(command)
    if name in CONVERSIONS and words[1:]:
        shutil.rmtree(words.pop(1), ignore_errors=True)  # an earlier example's output of that name
    for word in words:
        if word in MAKERS and not Path(word).exists():
            MAKERS[word](Path(word))


def _bert(folder: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    from tests.support.tiny_checkpoints import save

    config = BertConfig(
        vocab_size=100, hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96,
        max_position_embeddings=64,
    )  # fmt: skip
    save(_seeded(BertForSequenceClassification, config), folder)


def _clip(folder: Path) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    from tests.support.tiny_checkpoints import save

    config = CLIPVisionConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=3, image_size=32, patch_size=8
    )
    save(_seeded(CLIPVisionModel, config), folder)


def _seeded(kind: Any, config: Any) -> Any:
    import torch

    from tests.support.perturb import perturb

    torch.manual_seed(0)
    return perturb(kind(config).eval())


def _out(folder: Path) -> None:
    convert("demo:gpt2", folder)


def _copy_of_out(folder: Path) -> None:
    if not Path("out").exists():
        _out(Path("out"))
    shutil.copytree("out", folder)


def _fused(folder: Path) -> None:
    convert("demo:convnet", folder, "fuse-bn")


def _broken(folder: Path) -> None:
    """``out`` with one bias changed."""
    from safetensors.torch import load_file, save_file

    _copy_of_out(folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["transformer.h.1.mlp.c_fc.bias"][3] += 1.0
    save_file(tensors, file, {"format": "pt"})


def _tampered(folder: Path) -> None:
    """``out`` with one bit of one weight flipped, and a value of the config changed."""
    _copy_of_out(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"layer_norm_epsilon": 0.001}, indent=2))
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    header = int.from_bytes(data[:8], "little")
    start = json.loads(data[8 : 8 + header])["transformer.h.1.mlp.c_fc.weight"]["data_offsets"][0]
    data[8 + header + start + 64] ^= 1
    file.write_bytes(bytes(data))


def _limits(file: Path) -> None:
    file.write_text("algebra: 1e-10\nroundng: 1.5\n", encoding="utf-8")


def _weights(file: Path) -> None:
    """Weights of a timm model and nothing else."""
    import timm
    from safetensors.torch import save_file

    save_file(timm.create_model("efficientnet_b0", num_classes=10).state_dict(), file)


def _gpt2_weights(file: Path) -> None:
    """Weights of a small GPT-2 and nothing else."""
    from safetensors.torch import save_model
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 101, "n_embd": 48, "n_inner": 80, "n_layer": 2, "n_head": 3, "n_positions": 32}
    config = GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)
    save_model(GPT2LMHeadModel(config), str(file))


MAKERS: dict[str, Callable[[Path], None]] = {
    "tiny-bert": _bert,
    "tiny-clip-vision": _clip,
    "ckpt.safetensors": _weights,
    "gpt2-weights.safetensors": _gpt2_weights,
    "out": _out,
    "fused": _fused,
    "broken": _broken,
    "tampered": _tampered,
    "limits.yaml": _limits,
}
"""What the examples read -> what makes it."""


def alike(said: list[str], page: list[str]) -> bool:
    """Whether two outputs say the same but for the machine's figures."""
    return [_without_figures(line) for line in said] == [_without_figures(line) for line in page]


def _without_figures(line: str) -> str:
    for pattern, mark in FIGURES:
        line = pattern.sub(mark, line)
    return line.rstrip()


def shown(example: Example, said: list[str]) -> list[str]:
    """What the page is to show: all of it, or as many lines as it shows now from the first that begins alike."""
    if not example.is_part:
        return said
    word = example.said[1].split()[0]
    first = next((number for number, line in enumerate(said) if line.split()[:1] == [word]), 0)
    return [ELLIPSIS, *said[first : first + len(example.said) - 1]]


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder to run examples in, with the recipes; the width of a terminal is fixed."""
    before, width = Path.cwd(), os.environ.get("COLUMNS")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.environ["COLUMNS"] = "80"
        shutil.copytree(ROOT / "recipes", "recipes")
        try:
            yield Path(folder)
        finally:
            os.chdir(before)
            if width is None:
                del os.environ["COLUMNS"]
            else:
                os.environ["COLUMNS"] = width


def option_table() -> list[str]:
    """What options of rmsnorm do to the embedded language model, as a table."""
    rows = ["| option | tensors edited | centred at its output | rounding | top-1 |", "| --- | --- | --- | --- | --- |"]
    options: dict[str, dict[str, Any]] = {
        "(none)": {}, "`--fold`": {"fold": True}, "`--tied untie`": {"tied": "untie"},
        "`--dtype float16`": {"dtype": "float16"}, "`--dtype bfloat16`": {"dtype": "bfloat16"},
    }  # fmt: skip
    for name, chosen in options.items():
        report = convert("demo:gpt2", f"option-{len(rows)}", **chosen)
        centred = [f"`{edit['path']}`" for edit in report.plan.modules if edit["op"] == "center"]
        figures = report.fidelity
        assert figures is not None
        assert figures.rounding is not None
        assert figures.top1 is not None
        rows.append(
            f"| {name} | {report.tensors_edited} | {', '.join(centred) or 'nothing'} | {figures.rounding:.3g} × "
            f"| {100 * figures.top1:.2f} % |"
        )
    return rows


def with_table(lines: list[str]) -> list[str]:
    """The lines of a page with the table of options made anew between its marks; unchanged if there are none."""
    if BEGIN not in lines:
        return lines
    start, end = lines.index(BEGIN), lines.index(FINISH)
    return [*lines[: start + 1], *option_table(), *lines[end:]]


def main() -> int:
    """Write the pages, or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", default=PAGES)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--only", metavar="COMMAND", help="run and write anew only what begins so, such as bench")
    arguments = parser.parse_args()
    different = 0
    for name in arguments.pages:
        page = ROOT / "docs" / name
        lines = page.read_text(encoding="utf-8").splitlines()
        with scratch():
            wanted = [e for e in examples(page) if e.can_run and e.command.startswith(arguments.only or "")]
            found = [(example, shown(example, execute(example.command))) for example in wanted]
        for example, said in reversed(found):  # from the end, so that the lines before stay where they are
            if not arguments.only and (example.varies or alike(said, list(example.said))):
                continue
            different += 1
            print(f"docs/{name}:{example.line + 1}: $ normconvert {example.command}", file=sys.stderr)
            first = example.line + 1
            lines[first : first + len(example.said)] = [INDENT + line if line else "" for line in said]
        if not arguments.only:
            with scratch():
                made = with_table(lines)
            if not alike(made, lines):
                different += 1
                lines = made
                print(f"docs/{name}: the table of options", file=sys.stderr)
        if different and not arguments.check:
            page.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 1 if arguments.check and different else 0


if __name__ == "__main__":
    raise SystemExit(main())
