"""Docstrings for the site, as griffe reads them. Named in ``mkdocs.yml``.

References such as ``:func:`convert``` become plain code, and a function of a request is shown as it is called: with the
request's fields as its arguments, which are nowhere in its source.
"""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from typing import Any

import griffe

ROLE = re.compile(r":(?:\w+:)?\w+:`~?([^`]+)`")
TAKING = "normconvert.option_fields.taking"
KINDS: dict[Any, Any] = {
    inspect.Parameter.POSITIONAL_OR_KEYWORD: griffe.ParameterKind.positional_or_keyword,
    inspect.Parameter.KEYWORD_ONLY: griffe.ParameterKind.keyword_only,
}


class PlainRoles(griffe.Extension):
    """Called by griffe for every object that it reads."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Rewrite the object's docstring."""
        if obj.is_function and any(decorator.callable_path == TAKING for decorator in obj.decorators):
            _as_called(obj)
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(r"`\1`", obj.docstring.value)


def _as_called(obj: Any) -> None:
    """Give a function the parameters and the docstring that it has once it is decorated."""
    function = getattr(import_module(obj.module.path), obj.name)
    obj.parameters = griffe.Parameters(
        *(
            griffe.Parameter(
                name,
                annotation=parameter.annotation if isinstance(parameter.annotation, str) else None,
                kind=KINDS[parameter.kind],
                default=None if parameter.default is inspect.Parameter.empty else repr(parameter.default),
            )
            for name, parameter in inspect.signature(function).parameters.items()
        )
    )
    # A bracket would begin a link.
    obj.docstring.value = inspect.cleandoc(function.__doc__ or "").replace("[", "\\[")
