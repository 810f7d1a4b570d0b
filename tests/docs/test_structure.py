"""The code stays in pieces that one can read: short functions, short files, packages that say what they are."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LONGEST_FUNCTION = 60
LONGEST_FILE = 420


def python_files(*folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted((ROOT / folder).rglob("*.py"))


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from ``def`` to the end, without the docstring."""
    lines = _lines(function)
    return lines - _lines(function.body[0]) if ast.get_docstring(function) is not None else lines


def _lines(node: ast.stmt) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def long_functions(file: Path) -> list[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    functions = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    return [f"{file.name}: {f.name} ({body_lines(f)})" for f in functions if body_lines(f) > LONGEST_FUNCTION]


def is_checked(file: Path) -> bool:
    return file != ROOT / "normconvert" / "runtime.py"


@pytest.mark.parametrize("folder", ["normconvert", "tools"])
def test_a_function_fits_on_one_screen(folder: str) -> None:
    assert [found for file in python_files(folder) for found in long_functions(file)] == []


@pytest.mark.parametrize("folder", ["normconvert", "tools", "tests"])
def test_a_file_is_about_one_thing(folder: str) -> None:
    lengths = {file: len(file.read_text(encoding="utf-8").splitlines()) for file in python_files(folder)}
    long = {str(file.relative_to(ROOT)): n for file, n in lengths.items() if n > LONGEST_FILE and is_checked(file)}
    assert long == {}


def test_a_package_says_what_it_is() -> None:
    packages = [file for file in python_files("normconvert", "tools", "tests") if file.name == "__init__.py"]
    assert packages
    said = {file: ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "" for file in packages}
    assert [str(file.relative_to(ROOT)) for file, text in said.items() if len(text.splitlines()) < 2] == []


def test_a_docstring_does_not_count(tmp_path: Path) -> None:
    lines = [*["    x = 1"] * (LONGEST_FUNCTION - 1), ""]
    file = tmp_path / "a.py"
    file.write_text("\n".join(["def f():", '    """One.', "", '    Two."""', *lines]))
    assert long_functions(file) == []
    file.write_text("\n".join(["def f():", '    """One."""', "    x = 1", *lines]))
    assert long_functions(file) == [f"a.py: f ({LONGEST_FUNCTION + 1})"]
