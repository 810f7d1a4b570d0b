"""The documentation: what its pages say is what the code does, and every page is on the site."""

from __future__ import annotations

import doctest
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
import yaml

import normconvert
from normconvert.analysis.op_table import TABLE
from normconvert.cli.app import app
from normconvert.rewrites.registry import REWRITES
from tools.docs import command_output
from tools.docs.command_output import Example, alike, examples, execute, scratch, shown
from tools.docs.site_hooks import on_config

ROOT = Path(__file__).parents[2]
QUICK = (
    "README.md:rmsnorm", "commands.md:inspect", "commands.md:identify", "commands.md:rmsnorm tiny-bert all-or-none",
    "commands.md:rmsnorm --help", "ci.md:verify", "recipes.md:run",
)  # fmt: skip
"""Examples that every run of the tests compares. ``run`` and ``demo`` are compared where they are tested, too; the
others take a conversion each, and are slow tests."""


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    found = re.findall(rf"^ *```{language}\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(block) for block in found]


@pytest.fixture
def float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)


@pytest.mark.usefixtures("float64")
def test_the_numbers_of_the_worked_example_are_what_python_computes() -> None:
    session = "\n".join(blocks("how-it-works.md", "pycon"))
    assert session.count(">>>") > 30
    test = doctest.DocTestParser().get_doctest(session, {}, "how-it-works.md", None, 0)
    said: list[str] = []
    outcome = doctest.DocTestRunner(verbose=False).run(test, out=said.append)
    assert outcome.failed == 0, "".join(said)


def test_the_operation_and_the_rewrite_of_the_page_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TABLE, "aten.rot90", None)  # put back as it was, there or not
    monkeypatch.delitem(TABLE, "aten.rot90")
    monkeypatch.setitem(REWRITES, "absorb", None)
    code = blocks("extending.md", "python")
    assert len(code) == 4
    exec(compile("\n".join(code), "extending.md", "exec"), {"__name__": "extending"})


def named(example: Example) -> str:
    return f"{example.page}:{example.command}"


def all_examples() -> list[Any]:
    found = [example for name in command_output.PAGES for example in examples(ROOT / "docs" / name) if example.can_run]
    return [
        pytest.param(e, id=named(e), marks=[] if named(e).startswith(QUICK) else pytest.mark.slow)
        for e in found
        if not e.varies
    ]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with scratch() as made:
        yield made


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("example", all_examples())
def test_a_command_says_what_its_page_says(example: Example) -> None:
    assert alike(shown(example, execute(example.command)), list(example.said)), (
        f"docs/{example.page}:{example.line + 1} is out of date: run python tools/docs/command_output.py"
    )


@pytest.mark.slow
def test_the_table_of_options_is_what_the_conversions_give(folder: Path) -> None:
    lines = (ROOT / "docs/commands.md").read_text(encoding="utf-8").splitlines()
    assert alike(command_output.with_table(lines), lines)


def test_times_are_left_out_wherever_they_wrap_and_nothing_else_is() -> None:
    said = "\n  norms  9\n  seconds       open 0.1 · fuse\n                  7.2\n                agreement\n  a  1\n\n"
    assert command_output.lines_of(said) == ["  norms  9", "                agreement", "  a  1"]


def test_figures_may_differ_and_words_and_counts_may_not() -> None:
    page = ["  rounding  0.982 × the original's  ✓ at most 2 ×", "9 of 9 in 7.2 s, 5.8e-16 off, KL 0"]
    assert alike(["  rounding  1.1 × the original's  ✓ at most 2 ×", "9 of 9 in 10 s, 1e-15 off, KL 2e-16"], page)
    assert not alike([page[0].replace("✓", "✗"), page[1]], page)
    assert not alike([page[0], page[1].replace("9 of 9", "8 of 9")], page)
    assert not alike(page[:1], page)


def source_text() -> str:
    """The package's code with string literals joined and what is put into them as an ellipsis."""
    text = " ".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "normconvert").rglob("*.py")))
    text = re.sub(r'"\s*\n\s*[fr]?"', "", text)
    return re.sub(r"\{[^{}]*\}", "…", text).replace("`", "")


def test_every_message_of_the_troubleshooting_page_is_one_of_the_program() -> None:
    code, page = source_text(), (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    rows = [line[2:].split(" | ")[0] for line in page.splitlines() if line.startswith("| ")]
    messages = [row.replace("`", "") for row in rows if row not in ("---", "message", "reason")]
    assert len(messages) > 60
    parts = [(m, part.strip(" '():,;.")) for m in messages for part in re.split("…| / ", m)]
    assert [m for m, part in parts if len(part) >= 12 and part not in code] == []


def test_every_page_is_on_the_site() -> None:
    config: dict[str, Any] = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    config = on_config({**config, "docs_dir": ROOT / "docs"})
    text = yaml.safe_dump(config["nav"])
    pages = sorted(path.name for path in (ROOT / "docs").glob("*.md"))
    assert [name for name in pages if f": {name}" not in text] == []


def test_every_command_and_every_function_has_its_place() -> None:
    commands = (ROOT / "docs/commands.md").read_text(encoding="utf-8")
    missing = [name for name in typer.main.get_command(app).commands if f"normconvert {name}" not in commands]  # type: ignore[attr-defined]
    assert missing == []
    reference = (ROOT / "docs/python.md").read_text(encoding="utf-8")
    public = [name for name in normconvert.__all__ if name != "__version__"]
    assert [name for name in public if f".{name}\n" not in reference] == []
