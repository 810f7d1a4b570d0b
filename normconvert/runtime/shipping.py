"""The one file that transformers outputs carry, put together from the parts of this package.

``modeling_normconvert.py`` has to run where normconvert is not installed, so it holds the parts one after another: the
imports first, each once, none of the package, and then what each part defines. A part can be what it likes as long as
it keeps to what :func:`assemble` asks for, which it says when a part does not.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path

PARTS = (
    "one_thread", "kernels", "bases", "norms", "affine", "modules", "attention", "renaming", "hooks", "padding",
    "schema", "edits", "own_file", "classes",
)  # fmt: skip
"""In the order of the file: each uses those before it. ``own_file`` stands for this module."""

TITLE = '''\
"""RMSNorm, and the loader that puts it in place: what a converted checkpoint needs to run.

normconvert writes this file beside the weights as ``modeling_normconvert.py``. It imports torch, lazily transformers,
and nothing of normconvert. Any architecture works without code of its own, since a converted class is made on demand
from the class that ``config.json`` names::

    AutoModelForCausalLM.from_pretrained(OUT, trust_remote_code=True)

asks this module for, say, ``GPT2LMHeadModel``; the module's ``__getattr__`` answers with a subclass of the library's
class of that name whose constructor applies the module edits found in the config. The subclass keeps the name, so that
whatever looks at class names (pipelines, weight renaming, ``architectures`` in a saved config) sees the architecture.

An edit is plain data, a row with ``op`` naming a function of ``MODULE_EDITS``.
"""
'''

_PACKAGE = "normconvert"
Import = tuple[str, str, str | None]
"""(module, name or "" for the module itself, the name it gets or None)."""


@lru_cache(maxsize=1)
def shipped_source() -> str:
    """The text of ``modeling_normconvert.py``; the same for the same package."""
    folder = Path(__file__).parent
    return assemble({part: (folder / f"{part}.py").read_text(encoding="utf-8") for part in PARTS})


def own_source() -> str:
    """What ``save_pretrained`` writes beside the weights: the parts as one file."""
    return shipped_source()


def assemble(parts: Mapping[str, str]) -> str:
    """One module that defines what the parts define.

    Args:
        parts: name -> source, in the order in which they are to follow each other. Each begins with its docstring and
            then all its imports of the package, which name single things of parts before it.

    Raises:
        ValueError: a part imports something else of the package, gives it another name, or imports it inside a
            function; imports do not come first; or two parts define one name.
    """
    imports: set[Import] = set()
    owners: dict[str, str] = {}
    sections = []
    for part, source in parts.items():
        tree = ast.parse(source)
        start = _first_line(part, tree)
        for found in _imports(part, tree):
            if found[0].split(".")[0] != _PACKAGE:
                imports.add(found)
                bound, origin = found[2] or found[1] or found[0].split(".")[0], f"an import of {found[0]}"
                if owners.setdefault(bound, origin) != origin:
                    raise ValueError(f"{part} imports {bound}, and {owners[bound]} defines it")
            elif found[1] not in owners:
                raise ValueError(f"{part} imports {found[1]}, which no part before it defines")
        for name in _defined(tree):
            if name in owners:
                raise ValueError(f"{part} defines {name}, and so does {owners[name]}")
            owners[name] = part
        text = "".join(source.splitlines(keepends=True)[start:]).strip("\n")
        sections.append(f"{_heading(part, tree)}\n\n{_separated(text)}\n")
    return "\n".join([TITLE, *_import_lines(imports), ""]) + "\n\n".join(sections)


def _first_line(part: str, tree: ast.Module) -> int:
    """How many lines the docstring and the imports take."""
    end, body = 0, tree.body
    for position, node in enumerate(body):
        if isinstance(node, (ast.Import, ast.ImportFrom)) or (position == 0 and ast.get_docstring(tree)):
            end = node.end_lineno or 0
        else:
            break
    late = [node.lineno for node in body if isinstance(node, (ast.Import, ast.ImportFrom)) and node.lineno > end]
    if late:
        raise ValueError(f"{part} has an import in line {late[0]}, behind other code")
    return end


def _imports(part: str, tree: ast.Module) -> Iterator[Import]:
    """What the part imports at its top; inside functions it may import anything but the package."""
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
        own = any(module.split(".")[0] == _PACKAGE for module in modules)
        plain = isinstance(node, ast.ImportFrom) and not any(alias.asname or alias.name == "*" for alias in node.names)
        if getattr(node, "level", 0) or (own and not (plain and id(node) in top)):
            raise ValueError(f"{part} has an import of the package in line {node.lineno} that cannot be left out")
        if id(node) in top:
            for alias in node.names:
                if isinstance(node, ast.ImportFrom):
                    yield node.module or "", alias.name, alias.asname
                else:
                    yield alias.name, "", alias.asname


def _defined(tree: ast.Module) -> Iterator[str]:
    """The names that a module gives a value at its top."""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (target.id for target in targets if isinstance(target, ast.Name))


def _heading(part: str, tree: ast.Module) -> str:
    """A comment in the place of the part's docstring."""
    about = (ast.get_docstring(tree) or "").splitlines()
    return "\n".join([f"# -- {part} {'-' * (113 - len(part))}", *(f"# {line}".rstrip() for line in about)])


def _separated(text: str) -> str:
    """Two empty lines where a definition follows the heading, as everywhere."""
    return f"\n{text}" if text.startswith(("def ", "class ", "@")) else text


def _import_lines(imports: set[Import]) -> Iterator[str]:
    """Sorted as ruff sorts them: __future__, the standard library, others; constants, classes, functions."""
    groups: dict[int, dict[tuple[bool, str], list[str]]] = {}
    for module, name, other in sorted(imports, key=lambda i: (_kind(i[1]), i[1])):
        top = module.split(".")[0]
        group = groups.setdefault(0 if top == "__future__" else 1 if top in sys.stdlib_module_names else 2, {})
        renamed = f" as {other}" if other else ""
        group.setdefault((name != "", module), []).append(f"{name or module}{renamed}")
    for _, group in sorted(groups.items()):
        for (single, module), names in sorted(group.items()):
            yield from [f"from {module} import {', '.join(names)}"] if single else [f"import {n}" for n in names]
        yield ""


def _kind(name: str) -> int:
    return 0 if name.isupper() and len(name) > 1 else 1 if name[:1].isupper() else 2
