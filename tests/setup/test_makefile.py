"""The set-up by make: what each target installs, with uv or with pip, and what it says. No network is used."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = (
    "make",
    "sh",
    "date",
    "du",
    "cut",
    "cat",
    "touch",
    "mkdir",
    "chmod",
    "rm",
    "mktemp",
    "sleep",
    "grep",
    "tail",
    "sed",
)

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")

# Makes an environment whose commands do nothing, and writes down how it is called.
UV = """\
#!/bin/sh
echo "$*" >> calls
if [ "$1" = venv ]; then
    for folder; do :; done
    mkdir -p "$folder/bin"
    for command in python normconvert lint-imports; do
        printf '#!/bin/sh\\necho "$0 $*" >> calls\\n' > "$folder/bin/$command"
        chmod +x "$folder/bin/$command"
    done
else
    echo "Resolved nothing"
    exit ${UV_STATUS:-0}
fi
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the Makefile and a PATH, ``bin``, on which there is no uv."""
    (tmp_path / "tools/setup").mkdir(parents=True)
    for file in ("Makefile", "pyproject.toml", "tools/setup/timed.sh"):
        shutil.copy(ROOT / file, tmp_path / file)
    (tmp_path / "bin").mkdir()
    for tool in TOOLS:
        found = shutil.which(tool)
        assert found is not None, tool
        (tmp_path / "bin" / tool).symlink_to(found)
    (tmp_path / "bin/python3").symlink_to(sys.executable)
    return tmp_path


def with_uv(checkout: Path) -> None:
    (checkout / "bin/uv").write_text(UV)
    (checkout / "bin/uv").chmod(0o755)


def calls(checkout: Path) -> list[str]:
    """How the stand-ins were called since the last time; not the checks of what is there."""
    file = checkout / "calls"
    lines = file.read_text().splitlines() if file.exists() else []
    file.unlink(missing_ok=True)
    return [line for line in lines if "--version" not in line]


def make(checkout: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    return subprocess.run(
        ["make", *arguments], cwd=checkout, env={**kept, "PATH": str(checkout / "bin"), **environment},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def installs(text: str) -> list[str]:
    """What is installed, in this order: the last word of each command that installs."""
    return [line.split()[-1].strip("'") for line in text.splitlines() if "pip install" in line]


@pytest.mark.parametrize("uv", [False, True])
def test_each_target_installs_what_it_needs_and_no_more(checkout: Path, uv: bool) -> None:
    if uv:
        with_uv(checkout)
    said = {target: make(checkout, "-n", target).stdout for target in ("demo", "lint", "test", "slow", "docs")}
    assert installs(said["demo"]) == ["."]
    for target in ("lint", "test", "slow"):
        assert installs(said[target]) == [".", ".[dev]"]
    assert installs(said["docs"]) == [".", ".[docs]"]
    assert ("uv pip install" in said["demo"]) == ("uv venv" in said["demo"]) == uv
    assert ("-m pip install" in said["demo"]) == ("python3 -m venv" in said["demo"]) == (not uv)


def test_another_python_is_used_for_the_environment(checkout: Path) -> None:
    assert "python3.12 -m venv .venv" in make(checkout, "-n", "demo", "PYTHON=python3.12").stdout
    with_uv(checkout)
    assert '--python "$(python3.12 -c' in make(checkout, "-n", "demo", "PYTHON=python3.12").stdout


def test_what_is_imported_is_compiled_once_even_where_python_is_told_to_keep_nothing(checkout: Path) -> None:
    (checkout / "show.mk").write_text('include Makefile\nshow:\n\t@echo "told: $$PYTHONDONTWRITEBYTECODE"\n')
    assert make(checkout, "-f", "show.mk", "show", PYTHONDONTWRITEBYTECODE="1").stdout == "told: \n"


def test_a_python_that_is_too_old_is_refused_before_anything_is_made(checkout: Path) -> None:
    (checkout / "bin/python2").write_text("#!/bin/sh\nexit 1\n")
    (checkout / "bin/python2").chmod(0o755)
    done = make(checkout, "demo", "PYTHON=python2")
    assert done.returncode != 0
    assert "needs Python 3.10 or newer; choose one with: make PYTHON=" in done.stderr
    assert not (checkout / ".venv").exists()


def test_the_set_up_happens_once_and_says_what_it_does_and_how_long_it_took(checkout: Path) -> None:
    with_uv(checkout)
    done = make(checkout, "demo")
    assert done.returncode == 0, done.stderr
    making, first, installing, second, ready, demo = done.stdout.splitlines()
    assert making == "making .venv ..."
    assert installing.startswith("installing normconvert with torch")
    assert first.strip().startswith("took ")
    assert second.strip().startswith("took ")
    assert ready.startswith("set up in ")
    assert ready.split(": ")[1].startswith(".venv, ")
    assert demo == ".venv/bin/normconvert demo"
    assert calls(checkout) == [
        f"venv --seed --python {checkout / 'bin/python3'} .venv",
        "pip install --python .venv/bin/python --editable .",
        ".venv/bin/normconvert demo",
    ]

    assert make(checkout, "demo").stdout.splitlines() == [demo]
    assert calls(checkout) == [demo]

    assert make(checkout, "lint").returncode == 0
    assert calls(checkout) == [
        "pip install --python .venv/bin/python --editable .[dev]",
        ".venv/bin/python -m ruff check",
        ".venv/bin/lint-imports ",
        ".venv/bin/python -m mypy",
    ]


def test_an_installation_that_fails_says_why_and_is_tried_again(checkout: Path) -> None:
    with_uv(checkout)
    done = make(checkout, "demo", UV_STATUS="7")
    assert done.returncode != 0
    assert "Resolved nothing" in done.stderr
    assert "failed after" in done.stderr
    assert ".venv/bin/normconvert demo" not in calls(checkout)
    assert make(checkout, "demo").returncode == 0
    assert [line.split()[0] for line in calls(checkout)] == ["pip", ".venv/bin/normconvert"]  # no second environment


def test_what_takes_long_shows_its_last_line_and_how_large_the_environment_is(checkout: Path) -> None:
    (checkout / ".venv").mkdir()
    command = [
        "sh",
        "tools/setup/timed.sh",
        "unpacking",
        "sh",
        "-c",
        "echo '  Downloading torch'; echo WARNING: no; sleep 3; exit 4",
    ]
    done = subprocess.run(
        command, cwd=checkout, env={**os.environ, "BEAT": "1"}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 4
    start, beat, *_ = done.stdout.splitlines()
    assert start == "unpacking ..."
    assert " in .venv: Downloading torch" in beat
    assert done.stderr.splitlines()[:2] == ["  Downloading torch", "WARNING: no"]
