"""What is published for others' CI: the action and the pre-commit hook, run as their runners run them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]


def action() -> dict[str, Any]:
    data: dict[str, Any] = yaml.safe_load((ROOT / "action.yml").read_text())
    return data


def test_the_action_uses_each_of_its_inputs_and_none_inside_a_script() -> None:
    steps = action()["runs"]["steps"]
    text = (ROOT / "action.yml").read_text()
    used = set(re.findall(r"inputs\.([\w-]+)", text))
    assert used == set(action()["inputs"])
    for step in steps:
        if "run" in step:
            assert "${{" not in step["run"]  # whatever an input holds, it is no part of a script
            assert step["shell"] == "bash"


NORMCONVERT = f'exec "{sys.executable}" -m normconvert "$@"'


def run_step(
    name: str, folder: Path, inputs: dict[str, str], command: str = NORMCONVERT
) -> subprocess.CompletedProcess[str]:
    """A step of the action with its environment filled in, as the runner does it; ``command`` is normconvert there."""
    (step,) = [step for step in action()["runs"]["steps"] if step.get("id") == name]
    values = {key: str(spec.get("default", "")) for key, spec in action()["inputs"].items()} | inputs
    environment = {
        key: re.sub(r"\$\{\{ inputs\.([\w-]+) \}\}", lambda match: values[match[1]], value)
        for key, value in step["env"].items()
    }
    tools = folder / "bin"
    tools.mkdir(exist_ok=True)
    script = tools / "normconvert"
    script.write_text(f"#!/bin/sh\n{command}\n")
    script.chmod(0o755)
    here = {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "GITHUB_STEP_SUMMARY": str(folder / "s.md"),
    }
    return subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]], cwd=folder, text=True,
        capture_output=True, env={**os.environ, **environment, **here, "RUNNER_TEMP": str(folder)}, timeout=300,
    )  # fmt: skip


def test_the_action_runs_both_commands_and_fails_when_one_fails(pair: tuple[Path, Path], tmp_path: Path) -> None:
    source, out = map(str, pair)
    limits = tmp_path / "limits.yaml"
    limits.write_text("kl: 0\n")
    inputs = {"original": source, "converted": out, "limits": str(limits)}
    done = run_step("normconvert", tmp_path, inputs)
    assert done.returncode == 1, done.stderr
    assert "::error title=normconvert verify::kl is" in done.stdout
    assert "::notice title=normconvert check::" in done.stdout  # it ran all the same
    assert (tmp_path / "s.md").read_text().count("✅") >= 8
    reports = sorted(path.name for path in (tmp_path / "normconvert-reports").iterdir())
    assert reports == ["check.md", "check.xml", "verify.md", "verify.xml"]
    done = run_step("normconvert", tmp_path, {**inputs, "verify": "false"}, command='echo "called: $@"')
    assert done.returncode == 0, done.stderr
    (called,) = [line for line in done.stdout.splitlines() if line.startswith("called: ")]
    assert called.startswith(f"called: check {out} --source {source}")


def test_the_pre_commit_hook_is_a_command_of_ours() -> None:
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    assert hook["entry"] == "normconvert check"
    assert hook["pass_filenames"] is False
    pattern = re.compile(hook["files"])
    assert all(
        pattern.search(f"models/out/{n}")
        for n in ("normconvert.json", "config.json", "model-00001-of-00002.safetensors")
    )
