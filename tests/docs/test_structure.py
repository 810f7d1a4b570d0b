"""The code stays in pieces that one can read: short functions, short files, packages that say what they are."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from normconvert.compat import timm, torch, transformers
from normconvert.compat.private_names import rows

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


LIBRARIES = ("torch", "transformers", "timm", "huggingface_hub", "safetensors", "onnx", "peft", "datasets")
TABLES = {"_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks"}
"""Of a module, what it holds by name: as old as torch, and what its own documentation works with."""
STANDARD_LIBRARY = {"_exit", "_run_exitfuncs", "_fields", "_lru_cache_wrapper"}
PARTS = {"_to_copy", "_assert", "_embeds", "_hook", "_features", "_normconvert_lock"}
"""Of the names of ATen operations, arguments, methods and attributes, and a name of our own."""


def private_names(file: Path) -> Iterator[str]:
    """What a file asks of others under a name with an underscore, its own such names left out."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    nodes = list(ast.walk(tree))
    own = {n.name for n in nodes if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    own |= {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    own |= {
        n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store) and _is_self(n.value)
    }
    for node in nodes:
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in LIBRARIES:
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [part for a in node.names if a.name.split(".")[0] in LIBRARIES for part in a.name.split(".")]
        elif isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            names = [node.value]
        elif isinstance(node, ast.keyword):
            names = [node.arg or ""]
        yield from (n for n in names if re.match("_[A-Za-z]", n) and n not in own)


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def test_private_names_of_libraries_stand_in_compat_alone() -> None:
    shipped = {n.path.rpartition(".")[2] for n in transformers.NAMES if "shipped file" in n.use or "same" in n.use}
    allowed = TABLES | STANDARD_LIBRARY | PARTS
    found = {
        f"{file.relative_to(ROOT)}: {name}"
        for file in python_files("normconvert")
        for name in private_names(file)
        if "compat" not in file.parts and name not in allowed | (shipped if "runtime" in file.parts else set())
    }
    assert found == set()


@pytest.mark.parametrize("text", ["from torch._C import x", "import torch._ops", "m._version", "getattr(m, '_schema')"])
def test_private_names_are_seen(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(text, encoding="utf-8")
    assert list(private_names(tmp_path / "a.py"))


def test_the_design_lists_what_compat_uses() -> None:
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    for library in (torch, transformers, timm):
        assert "\n".join(rows(library.NAMES)) in text, "write what `rows` gives into docs/design.md"
