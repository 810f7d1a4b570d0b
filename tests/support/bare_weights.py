"""Files of weights that nothing says the architecture of."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import timm
from safetensors.torch import save_file
from torch import Tensor

from normconvert.files.safetensors_file import write_header
from normconvert.identification import Identification, Names
from normconvert.identification.building import build
from tests.support.perturb import perturb

UNIQUE = "test_vit"
TWINS = ["test_efficientnet_gn", "test_efficientnet_ln"]  # group norm and layer norm: the same names, other functions
State = dict[str, Tensor]


def state_of(name: str, **arguments: Any) -> State:
    model = perturb(timm.create_model(name, **arguments).eval())
    return {n: t.contiguous() for n, t in model.state_dict().items()}


def write(state: State, path: Path, metadata: dict[str, str] | None = None) -> Path:
    save_file(state, path, metadata=metadata)
    return path


def exact(found: Identification) -> list[str]:
    return [candidate.name for candidate in found.exact]


def names_of_model(name: str, **arguments: Any) -> Names:
    state = build(name, **arguments).state_dict()
    integers = frozenset(n for n, t in state.items() if not t.is_floating_point())
    return Names({n: tuple(t.shape) for n, t in state.items()}, integers)


def hollow(names: Names, path: Path) -> None:
    """A file of tensors that takes no room: a header and a hole."""
    rows = [(n, "I64" if n in names.integers else "F32", shape) for n, shape in names.shapes.items()]
    header = write_header(rows, {})
    path.write_bytes(header)
    os.truncate(path, len(header) + max(row["data_offsets"][1] for row in json.loads(header[8:]).values()))
