"""Docstrings for the site: references such as ``:func:`convert``` become plain code. Named in ``mkdocs.yml``."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:\w+:)?\w+:`~?([^`]+)`")


class PlainRoles(griffe.Extension):
    """Called by griffe for every object that it reads."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Rewrite the object's docstring."""
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(r"`\1`", obj.docstring.value)
