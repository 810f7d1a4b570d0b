"""Why an exporter gave up, in one line: the operation and the module of the model, if either is known."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from normconvert.errors import first_line

if TYPE_CHECKING:
    from torch import nn

ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
OPERATION = re.compile(r"\b(?:aten|prims|higher_order|torchvision)[.:]+(\w+)|OpOverload\(op='([\w.:]+)'")
LONGEST = 300


def why(error: BaseException, model: nn.Module, program: Any | None = None) -> str:
    """One line without escape codes: what the innermost error says, the operation, the module, the line of its code.

    Args:
        error: raised by an exporter or an engine.
        model: of which the exporter ran the code.
        program: the program of torch.export that was being written, if it was made.
    """
    chain = list(_chain(error))
    texts = [ESCAPES.sub("", str(one)) for one in chain]
    said = first_line(Exception(texts[-1].strip() or type(chain[-1]).__name__))[:LONGEST]
    found = next((match for text in reversed(texts) if (match := OPERATION.search(text))), None)
    operation = found and re.split(r"[.:]+", found[1] or found[2])[-1]
    module, line = _place(chain, model)
    if program is not None and operation:
        module = _module_with(program, operation) or module
    parts = [f"operation {operation}"] if operation and operation not in said else []
    parts += [f"module {module}"] if module else []
    parts += [line] if line else []
    return f"{said} ({', '.join(parts)})" if parts else said


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what caused it, the innermost last."""
    while error is not None:
        yield error
        error = error.__cause__


def _place(chain: list[BaseException], model: nn.Module) -> tuple[str, str]:
    """Path of the innermost module whose code was running, and that line."""
    paths = {id(module): path for path, module in model.named_modules()}
    module, line = "", ""
    for error in chain:
        trace = error.__traceback__
        while trace is not None:
            path = paths.get(id(trace.tb_frame.f_locals.get("self")))
            file = trace.tb_frame.f_code.co_filename
            if path is not None and "/torch/" not in file:
                module, line = path, f"{file.rsplit('site-packages/', 1)[-1].rsplit('/', 1)[-1]}:{trace.tb_lineno}"
            trace = trace.tb_next
    return module, line


def _module_with(program: Any, operation: str) -> str:
    """Path of the module that called an operation first in a program; empty if it is not in it."""
    for node in program.graph.nodes:
        if any(part.endswith(operation) for part in str(node.target).split(".")):
            stack = list((node.meta.get("nn_module_stack") or {}).values())
            return str(stack[-1][0]).removeprefix("model.") if stack else ""
    return ""
