"""Models that a Python file makes, ``--arch FILE.py:FACTORY``: whatever is of neither library.

The file has a function (or a class) ``FACTORY`` that takes no arguments and returns the module, and a function
``example_inputs`` that says how it is called, as :func:`normconvert.convert_model` takes it. Both run only where the
user said that the file is trusted.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from normconvert.errors import InputError, first_line
from normconvert.files.uninitialised import NoRandomInit
from normconvert.files.user_paths import user_path
from normconvert.plan.conversion_plan import Plan
from normconvert.sources.converted_form import load_weights
from normconvert.sources.factories import FACTORY
from normconvert.sources.source import Source
from normconvert.tracing.calls import calls_of, give_calls

EXAMPLE = "example_inputs"


def describe(source: Source) -> Source:
    """Fill in the architecture: the file's name and the factory's, without the path to it.

    Raises:
        InputError: the file has no such function, or does not run.
    """
    file, name = _parts(source)
    _function(source, name)
    _function(source, EXAMPLE)
    return replace(source, architecture=f"{file.name}:{name}", notes=(*source.notes, f"made by {name} of {file.name}"))


def build_meta(source: Source) -> nn.Module:
    """The model on the meta device; one that computes on tensors while it is made is made on the CPU."""
    try:
        with torch.device("meta"):
            return _made(source)
    except InputError:
        return build(source)


def build(source: Source) -> nn.Module:
    """The model, without random initialisation, and how it is called; the weights are the caller's to load."""
    with NoRandomInit():
        return _made(source)


def rename(source: Source, state: dict[str, torch.Tensor]) -> tuple[dict[str, str], frozenset[str]]:
    """The file's names are the model's: the map, and no name that is made by merging."""
    return {name: name for name in source.tensors if name in state}, frozenset()


def load(source: Source, dtype: torch.dtype) -> tuple[nn.Module, set[str]]:
    """The factory, then the weights; and the names for which there were none."""
    return load_weights(source, build(source), dtype, source.architecture)


def _made(source: Source) -> nn.Module:
    _, name = _parts(source)
    model = _run(source, name)
    if not isinstance(model, nn.Module):
        raise InputError(f"--arch {source.factory}: returned a {type(model).__name__}, expected a torch.nn.Module")
    with torch.device("cpu"):
        give_calls(model, calls_of(model, _run(source, EXAMPLE)))
    if source.record is not None:
        _untie(model, Plan.from_json(source.record["plan"]))
    return model


def _untie(model: nn.Module, plan: Plan) -> None:
    """Part what the file ties and the plan has parted: a library is told so in its config.json, a file is not."""
    for name, rows in plan.tensors.items():
        if any(row["op"] == "copy" for row in rows):
            path, _, leaf = name.rpartition(".")
            owner = model.get_submodule(path)
            owner.register_parameter(leaf, nn.Parameter(owner.get_parameter(leaf).detach().clone()))


def _run(source: Source, name: str) -> Any:
    try:
        return _function(source, name)()
    except Exception as error:  # of the user's code
        if isinstance(error, InputError):
            raise
        raise InputError(f"--arch {source.factory}: {name}() failed: {first_line(error)}") from error


def _function(source: Source, name: str) -> Any:
    file, _ = _parts(source)
    if not file.is_file():
        raise InputError(f"--arch {source.factory}: no such file")
    try:
        module = _module(file.resolve(), file.stat().st_mtime_ns)
    except Exception as error:  # as above
        raise InputError(f"--arch {source.factory}: {file.name} does not run: {first_line(error)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        expected = " that returns how the model is called, such as (x,)" if name == EXAMPLE else ""
        raise InputError(f"--arch {source.factory}: {file.name} has no function {name}(){expected}")
    return function


def _parts(source: Source) -> tuple[Path, str]:
    found = FACTORY.fullmatch(source.factory or "")
    assert found is not None
    return user_path(found[1]), found[2]


@functools.lru_cache(maxsize=8)
def _module(file: Path, written: int) -> ModuleType:
    """The file, run once as long as nobody writes to it; it may import what lies beside it."""
    spec = importlib.util.spec_from_file_location(f"normconvert_factory_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    sys.path.insert(0, str(file.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(file.parent))
    return module
