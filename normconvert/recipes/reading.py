"""From a YAML file to a checked recipe in which everything knows its line and column."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from normconvert.errors import InputError
from normconvert.files.yaml_file import Key, YamlFile, nearest, read_yaml
from normconvert.recipes.model import Recipe, keys_at

# ``$${`` stands for ``${``; whatever else begins with ``${`` has to be a variable.
_VARIABLE = re.compile(r"\$\$\{|\$\{(?:(?P<name>[A-Za-z_]\w*)(?::-(?P<default>[^}]*))?\})?")


LONGEST = 4096
"""Characters of a text: no path is longer, and each ``${`` is looked for to its end."""
MOST_ERRORS = 100
_WORDS = {"Input should be": "expected", "less than or equal to": "at most", "greater than or equal to": "at least"}


@dataclass(frozen=True)
class RecipeFile:
    """A recipe and the file it was read from."""

    file: YamlFile
    recipe: Recipe

    @property
    def name(self) -> str:
        """The file's name without its ending: ``{recipe}`` in an output's name."""
        return self.file.path.stem

    def where(self, key: Key) -> str:
        """``recipes/pythia.yaml:3:5``, for an entry."""
        line, column = _place(self.file, key)
        return f"{self.file.path}:{line}:{column}"


def read_recipe(path: str | Path, environment: Mapping[str, str] | None = None) -> RecipeFile:
    """Read and check a recipe.

    Args:
        path: a YAML file.
        environment: what ``${NAME}`` stands for; None: the process's environment.

    Raises:
        InputError: it cannot be read, is not YAML, or does not say what a recipe may say: one line for each error, with
            its line and column, and the nearest key for one that is not known.
    """
    file = read_yaml(path)
    if not isinstance(file.data, dict):
        found = "nothing" if file.data is None else f"a {type(file.data).__name__}"
        raise file.error((), f"expected a recipe (a mapping with sources), found {found}")
    problems: list[InputError] = []
    # After the parse, so that a variable's value is text whatever is in it, and cannot add keys.
    data = _substitute(file, (), file.data, os.environ if environment is None else environment, problems)
    # Values that could not be filled in would only cause a second error each.
    if not problems:
        try:
            return RecipeFile(file, Recipe.model_validate(data))
        except ValidationError as error:
            problems = _explain(file, error)
    raise together(problems)


def _place(file: YamlFile, key: Key) -> tuple[int, int]:
    """Line and column of an entry, or of the nearest one around it that has a place."""
    while key and key not in file.places:
        key = key[:-1]
    return file.places.get(key, (1, 1))


def together(problems: list[InputError]) -> InputError:
    """Several errors as one: the one itself, or a first line that counts them and a line for each."""
    if len(problems) == 1:
        return problems[0]
    return InputError("\n  ".join([f"{len(problems)} errors in recipes:", *map(str, problems)]))


def _substitute(
    file: YamlFile, key: Key, value: Any, environment: Mapping[str, str], problems: list[InputError]
) -> Any:
    """The values under an entry with their ``${...}`` replaced; keys stay as they are."""
    if isinstance(value, dict):
        return {k: _substitute(file, (*key, k), v, environment, problems) for k, v in value.items()}
    if isinstance(value, list):
        return [_substitute(file, (*key, i), v, environment, problems) for i, v in enumerate(value)]
    if not isinstance(value, str):
        return value
    if len(value) > LONGEST:
        problems.append(file.error(key, f"a text of {len(value)} characters, more than {LONGEST}"))
        return value

    def replacement(match: re.Match[str]) -> str:
        name, default = match["name"], match["default"]
        if match[0] == "$${":
            return "${"
        if name is None:
            problems.append(
                file.error(key, f"{_shown(value)}: expected ${{NAME}} or ${{NAME:-default}}; write $${{ for ${{")
            )
        elif name in environment:
            return environment[name]
        elif default is None:
            problems.append(
                file.error(key, f"the environment has no variable {name}: set it, or write ${{{name}:-default}}")
            )
        return default or ""

    return _VARIABLE.sub(replacement, value)


def _explain(file: YamlFile, error: ValidationError) -> list[InputError]:
    """pydantic's errors in the words of the file."""
    # Of more than anybody reads the first ones: to each the nearest key is looked for.
    rows = error.errors(include_url=False)[:MOST_ERRORS]
    places = [tuple(row["loc"]) for row in rows]
    problems = []
    for row, place in zip(rows, places, strict=True):
        inside = [other for other in places if other != place and other[: len(place)] == place]
        if row["type"] == "too_short" and inside:
            continue  # its entries were wrong, not missing
        name = str(place[-1]) if place else "recipe"
        if row["type"] == "extra_forbidden":
            above = [part for part in place[:-1] if isinstance(part, str)]
            at = f" in {above[-1]}" if above else ""
            problem = f"unknown key {name!r}{at}{nearest(name, keys_at(place[:-1]))}"
        elif row["type"] == "missing":
            problem = f"{name} is missing"
        elif row["type"] == "value_error":  # one of the model's own checks, which says what it is about
            problem = row["msg"].removeprefix("Value error, ")
        else:
            expected = row["msg"].partition(", unable")[0]
            for theirs, ours in _WORDS.items():
                expected = expected.replace(theirs, ours)
            problem = f"{name}: {expected}, found {_shown(row['input'])}"
        problems.append((_place(file, place), file.error(place, problem)))
    return [problem for _, problem in sorted(problems, key=lambda found: found[0])]


def _shown(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
