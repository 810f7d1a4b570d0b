"""Options and commands that people guess right: spellings, headings, completion in shells, hints."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main

from normconvert.benchmark.request import Benchmarking
from normconvert.cli import run
from normconvert.cli.app import app
from normconvert.cli.commands import Ask, command
from normconvert.exporting.request import Export
from normconvert.option_fields import about, check_options, taking
from normconvert.options import METHODS, Conversion, Opening, Options
from normconvert.recipes.model import Settings
from normconvert.tuning.settings import Swapping
from normconvert.verification.requests import Verification

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class _Nothing:
    """A view without options."""


def asked(request: type[Any], *arguments: str) -> Any:
    """What a command of this request would ask, given these arguments."""
    found: list[Any] = []
    one = typer.Typer()

    def keep(ask: Ask[Any], view: _Nothing) -> int:
        found.append(ask())
        return 0

    one.command()(command(request, _Nothing)(keep))
    one(list(arguments), standalone_mode=False)
    return found[0]


@pytest.mark.parametrize(("short", "name"), DTYPES.items())
def test_a_dtype_may_be_typed_short_wherever_there_is_one(short: str, name: str) -> None:
    for request in (Conversion, Benchmarking, Export):
        assert asked(request, "src", "out", "--dtype", short).dtype == name
    assert asked(Verification, "a", "b", "--dtype", short).dtype == getattr(torch, name)
    assert Settings.model_validate({"dtype": short}).dtype == name

    @taking(Conversion)
    def convert(request: Conversion) -> str:
        check_options(request)
        return request.dtype

    assert convert("src", "out", dtype=short) == name
    assert asked(Swapping, "src", "out", "--data", "demo:", "--mixed-precision", "bfloat16").mixed_precision == "bf16"


def test_every_option_that_changes_a_plan_or_opens_a_source_is_where_plans_and_sources_are() -> None:
    def options_of(name: str) -> set[str]:
        return {parameter.name for parameter in COMMANDS[name].params}

    plan, source = ({name for name, *_ in about(kind)} for kind in (Options, Opening))
    assert plan | source <= options_of("inspect")
    for name in ("rmsnorm", "fuse-bn", "export", "bench", "swap"):
        assert source <= options_of(name), name


def test_a_help_text_has_its_options_under_headings(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["fuse-bn", "--help"]) == 0
    said = capsys.readouterr().out
    headings = [line for line in said.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert headings == [
        "Arguments:", "What may change:", "What is read:", "What is written:", "How it is checked:", "What is told:",
    ]  # fmt: skip
    assert "--min-gain" not in said
    assert run(["--help"]) == 0
    said = capsys.readouterr().out
    assert said.index("Conversions:") < said.index("rmsnorm") < said.index("Before a conversion:")


def test_a_report_measures_layers_only_where_its_help_says_so() -> None:
    helps = {
        name: parameter.help
        for name, one in COMMANDS.items()
        for parameter in one.params
        if parameter.name == "report_file"
    }
    measuring = {name for name, text in helps.items() if "measures" in text}
    assert measuring == {*METHODS, "verify", "demo"}
    assert {"inspect", "export", "swap", "bench", "check"} <= set(helps)


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        ("convert", "a conversion is a command of its own: rmsnorm, crmsnorm, fuse-bn"),
        ("rmnorm", "did you mean rmsnorm?"),
        ("./model", "the command comes first, such as inspect ./model"),
        ("xyzzy", "no such command 'xyzzy'; see"),
    ],
)
def test_a_command_that_is_none_is_answered_with_what_was_meant(
    typed: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([typed, "a", "b"]) == 2
    assert hint in capsys.readouterr().err


@pytest.mark.parametrize("spelling", ["--method", "--for"])
def test_inspect_takes_the_old_spelling_and_refuses_what_changes_nothing(
    spelling: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["inspect", "demo:gpt2", spelling, "crmsnorm", "--merge-branches"]) == 2
    said = capsys.readouterr().err
    assert "--merge-branches changes nothing in crmsnorm; it belongs to fuse-bn: add --method fuse-bn" in said


def test_inspect_plans_with_the_options_of_the_conversion(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", "demo:convnet", "--method", "fuse-bn", "--merge-branches", "--json", "-"]) == 0
    assert '"merge_branches": true' in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [["--method", "repbn", "here", "there"], ["repbn", "here", "there"], ["--lr", "1", "un", "a", "b"]]
)
def test_swap_takes_its_method_as_an_option_and_where_it_used_to_stand(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    method = next(word for word in arguments if word in ("un", "repbn"))
    context = COMMANDS["swap"].make_context("swap", [*arguments, "--data", "demo:"])
    assert (context.params["method"], context.params["src"]) == (method, arguments[-2])


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
@pytest.mark.parametrize(
    ("line", "found", "absent"),
    [
        ("normconvert insp", "inspect", "rmsnorm"),
        ("normconvert fuse-bn --mer", "--merge-branches", "--min-gain"),
        ("normconvert inspect --method f", "fuse-bn", "rmsnorm"),
        ("normconvert rmsnorm --dtype fp", "fp16", "bf16"),
    ],
)
def test_shells_complete_commands_options_and_choices(
    shell: str, line: str, found: str, absent: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = line.split(" ")
    variables = {
        "_NORMCONVERT_COMPLETE": f"complete_{shell}",
        "_TYPER_COMPLETE_ARGS": line,
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
        "COMP_WORDS": "\n".join(words),
        "COMP_CWORD": str(len(words) - 1),
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        run([])
    said = capsys.readouterr().out
    assert found in said
    assert absent not in said


def test_bash_itself_completes_with_the_script_that_is_shown(tmp_path: Path) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash here")
    command_file = tmp_path / "normconvert"
    command_file.write_text(f'#!/bin/sh\nexec {sys.executable} -m normconvert "$@"\n')
    command_file.chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(Path(__file__).parents[2])}
    script = (
        "source <(_NORMCONVERT_COMPLETE=source_bash normconvert); COMP_WORDS=(normconvert rms); COMP_CWORD=1; "
        '_normconvert_completion normconvert; echo "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        [bash, "-c", script], capture_output=True, text=True, env={**os.environ, **variables}, check=False
    )
    assert done.stdout.split() == ["rmsnorm"], done.stderr


def test_a_report_says_which_file_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, document = tmp_path / "r.html", tmp_path / "d.json"
    arguments = ["inspect", "demo:gpt2", "--report", str(report), "--json", str(document)]
    assert run(arguments) == 0
    said = capsys.readouterr().err
    assert f"wrote {report}" in said
    assert f"wrote {document}" in said
    assert run([*arguments, "--quiet"]) == 0
    assert capsys.readouterr().err == ""
