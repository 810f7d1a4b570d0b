"""The first screen and what stands around it: it fits, its figures are those measured, what it names is there."""

from __future__ import annotations

import re
import shlex
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from normconvert import __version__
from normconvert.cli.app import app
from tools.docs.figures import figures
from tools.docs.stream_picture import PICTURE, picture

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def test_the_first_screen_answers_what_for_whom_when_not_and_how() -> None:
    screen = README.splitlines()[:60]
    text = "\n".join(screen)
    for part in ("](docs/stream.svg)", "pip install .", "**Use it when**", "**Not when**", "**What converts.**"):
        assert part in text, part
    for name in ("Use it when", "Not when"):
        after = text.partition(f"**{name}**\n\n")[2].partition("\n\n")[0]
        assert len(re.findall(r"^- ", after, re.MULTILINE)) == 3
    assert "    $ normconvert rmsnorm demo:gpt2 out" in screen
    assert any(line.startswith("      load it") for line in screen)
    assert "    make demo " in text
    assert "    make test " in text


@pytest.mark.parametrize(("what", "words"), figures().items())
def test_a_figure_of_the_readme_is_the_one_measured(what: str, words: str) -> None:
    said = " ".join(README.split())
    if what == "conversion":  # in a sentence of its own
        size, seconds, memory = re.findall(r"[\d.]+ (?:GB|s)\b", words)
        assert f"A checkpoint of {size} " in said
        assert f"converts without verification in {seconds} " in said
        assert f"with {memory} " in said
    else:
        assert words in said, f"{what}: run python -m tools.docs.figures"


def test_the_page_of_measurements_begins_with_what_was_found() -> None:
    head = (ROOT / "docs/performance.md").read_text(encoding="utf-8").partition("<!-- models -->")[0]
    said = " ".join(head.split())
    quoted = {what: words for what, words in figures().items() if not what.startswith("what ")}
    assert [what for what, words in quoted.items() if words not in said] == []


def test_the_picture_is_what_its_tool_draws() -> None:
    drawn = PICTURE.read_text(encoding="utf-8")
    assert drawn == picture(), "run python tools/docs/stream_picture.py"
    assert ElementTree.fromstring(drawn).tag.endswith("svg")


def test_each_place_where_the_result_runs_names_a_test_or_a_tool() -> None:
    page = (ROOT / "docs/where-it-runs.md").read_text(encoding="utf-8")
    table, _, listed = page.partition("## The tests")
    named = dict(re.findall(r"^(\d+)\. `(.+)`$", listed, re.MULTILINE))
    assert set(re.findall(r"\[(\d+)\]\(#the-tests\)", table)) == set(named)
    for name in named.values():
        file, _, function = name.partition("::")
        assert f"def {function}(" in (ROOT / file).read_text(encoding="utf-8") if function else (ROOT / file).is_file()


def typed(page: str) -> list[str]:
    """The commands of a page that are neither a pattern (SRC, OUT) nor cut short."""
    text = (ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(r"^ {4,}(?:\$ )?normconvert +(.+?)(?: {2,}#.*| +# .*)?$", text, re.MULTILINE)
    return [line for line in lines if not re.search(r"…|\.\.\.|\[|<|\|", line)]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_can_be_typed(page: str) -> None:
    for line in typed(page):
        name, *arguments = shlex.split(line)
        if name.startswith("-"):
            continue
        if {"-h", "--help"} & {*arguments}:
            continue
        context = COMMANDS[name].make_context(name, arguments)  # raises what a wrong option would
        assert context.command is COMMANDS[name]


@pytest.mark.slow
def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE):
        exec(block, scope)
    assert scope["fidelity"].passed
    assert "RMSNorm" in {type(module).__name__ for module in scope["model"].modules()}


def test_the_papers_of_the_project_are_readable_and_promise_nothing_that_is_not_so() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert not re.search(r"\b(any|every|all)\b", project["description"])
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == __version__
    templates = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))
    assert len(templates) == 3
    for template in templates:
        said = yaml.safe_load(template.read_text(encoding="utf-8"))
        assert template.name == "config.yml" or {"name", "description", "body"} <= set(said)
    installs = {line.strip() for page in PAGES for line in (ROOT / page).read_text(encoding="utf-8").splitlines()}
    assert not [line for line in installs if re.search(r"pip install normconvert\b", line)]
