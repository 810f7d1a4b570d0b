"""YAML files whose every entry knows its line and column, so that an error can point at it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normconvert.errors import InputError
from normconvert.files.weight_files import read_text

Key = tuple[str | int, ...]
"""Where an entry is: keys of mappings and indices of lists, from the root."""

LONGEST_NUMBER = 100
"""Characters of a number: of more of them some would take minutes to make, or cannot be printed."""
LARGEST = 1_000_000
"""Characters of a file."""
MOST_ENTRIES = 20_000
"""Of a file, with what aliases repeat."""
# YAML 1.1, which PyYAML reads, takes 1e-10 for a word; YAML 1.2 and everybody who writes it mean the number.
_FLOAT = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


@dataclass(frozen=True)
class YamlFile:
    """A parsed file.

    Attributes:
        path: where it was read from.
        data: plain values.
        places: entry -> (line, column) of its key, or of itself in a list; both counted from 1.
    """

    path: Path
    data: Any
    places: dict[Key, tuple[int, int]]

    def error(self, key: Key, message: str) -> InputError:
        """An error at an entry: ``limits.yaml:3:5: message``."""
        # What a check complains of may be an entry that is missing: then the one around it is shown.
        while key and key not in self.places:
            key = key[:-1]
        line, column = self.places.get(key, (1, 1))
        return InputError(f"{self.path}:{line}:{column}: {message}")

    def check_keys(self, known: Iterable[str], at: Key = ()) -> None:
        """Refuse keys of the mapping at ``at`` that are not ``known``, naming the nearest one that is.

        Raises:
            InputError: with line and column.
        """
        value = self.data
        for part in at:
            value = value[part]
        if not isinstance(value, dict):
            found = "nothing" if value is None else type(value).__name__
            raise self.error(at, f"expected keys with values ({', '.join(known)}), found {found}")
        for name in value:
            if name not in known:
                raise self.error((*at, name), f"unknown key {name!r}{nearest(str(name), known)}")


def nearest(name: str, known: Iterable[str]) -> str:
    """``; nearest: x`` for an error, or all that is known if nothing is near."""
    known = list(known)
    near = difflib.get_close_matches(name, known, 1, cutoff=0.5)
    return f"; nearest: {near[0]}" if near else f"; expected one of {', '.join(known)}"


def read_yaml(path: str | Path) -> YamlFile:
    """Parse a YAML file into plain values and the places of its entries.

    Raises:
        InputError: it cannot be read, is not YAML, has a key twice, or asks for anything but plain values.
    """
    import yaml

    path = Path(path)
    text = read_text(path)
    if len(text) > LARGEST:
        raise InputError(f"{path}: {len(text)} characters, more than {LARGEST}: too large for what people write")

    # A class of its own: resolvers are added to a class, and the whole program shares yaml.SafeLoader.
    class Loader(yaml.SafeLoader):
        """PyYAML's safe loader with YAML 1.2's numbers."""

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(rf"^(?:{_FLOAT.pattern})$"), list("-+.0123456789")
    )
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        places: dict[Key, tuple[int, int]] = {}
        # Before the values are made: of a key that is there twice PyYAML silently takes the last.
        _walk(path, loader, node, (), places)
        data = loader.construct_document(node) if node is not None else None
    except InputError:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise InputError(f"{path}{at}: not valid YAML: {error.problem or error.context}") from error
    # An anchor may hold itself, a date may not exist, a tag may stand before what it does not fit: the text decides
    # what PyYAML runs into, and no list of exceptions would be complete.
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{path}: not valid YAML: {first}") from error
    return YamlFile(path, data, places)


def _walk(path: Path, loader: Any, node: Any, at: Key, places: dict[Key, tuple[int, int]]) -> None:
    """Note the places of all entries under ``node``."""
    import yaml

    # Counted where it stands for what it means: aliases of aliases make millions of a few lines.
    if len(places) > MOST_ENTRIES:
        raise InputError(f"{path}: more than {MOST_ENTRIES} entries, counting what aliases repeat")
    if isinstance(node, yaml.ScalarNode) and node.tag.endswith((":int", ":float")) and len(node.value) > LONGEST_NUMBER:
        raise InputError(
            f"{path}:{node.start_mark.line + 1}:{node.start_mark.column + 1}: a number of {len(node.value)} "
            f"characters, more than {LONGEST_NUMBER}"
        )
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            _walk(path, loader, key_node, (), {})
            if key_node.tag.endswith(":merge"):
                mark = key_node.start_mark
                raise InputError(
                    f"{path}:{mark.line + 1}:{mark.column + 1}: << is not read here: write its entries out"
                )
            name = loader.construct_object(key_node, deep=True)
            place = (key_node.start_mark.line + 1, key_node.start_mark.column + 1)
            if not isinstance(name, (str, int, float, bool)):
                raise InputError(f"{path}:{place[0]}:{place[1]}: a key has to be a plain word")
            key = (*at, name if isinstance(name, int) else str(name))
            if key in places:
                raise InputError(
                    f"{path}:{place[0]}:{place[1]}: key {name!r} is there twice, first at line {places[key][0]}"
                )
            places[key] = place
            _walk(path, loader, value_node, key, places)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            places[at + (index,)] = (item.start_mark.line + 1, item.start_mark.column + 1)
            _walk(path, loader, item, at + (index,), places)
