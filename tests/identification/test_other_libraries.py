"""Files of libraries that are not read here are called what they are; where timm reads them, it computes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision

import normconvert
from normconvert.errors import InputError
from normconvert.identification.other_libraries import ROWS, TORCHVISION, other_library
from normconvert.identification.prints import load_index, read_print
from normconvert.sources import open_source
from tests.support.equivalence import distance
from tests.support.perturb import perturb

FAMILIES = {
    "mobilenet_v2": "mobilenet_v2", "mobilenet_v3_small": "mobilenet_v3", "efficientnet_b0": "efficientnet",
    "efficientnet_v2_s": "efficientnet", "convnext_tiny": "convnext", "vit_b_32": "vit", "swin_t": "swin",
    "swin_v2_t": "swin", "regnet_y_400mf": "regnet", "regnet_x_400mf": "regnet", "mnasnet0_5": "mnasnet",
    "shufflenet_v2_x0_5": "shufflenet_v2", "squeezenet1_0": "squeezenet", "squeezenet1_1": "squeezenet",
    "alexnet": "alexnet", "vgg11": "vgg", "vgg16_bn": "vgg",
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_torchvisions_families_are_known_by_their_names(name: str) -> None:
    with torch.device("cpu" if name.startswith("regnet") else "meta"):  # computes its widths as tensors
        names = getattr(torchvision.models, name)(weights=None).state_dict()
    said = other_library(set(names))
    assert said.startswith("these are torchvision's names: ")
    assert FAMILIES[name] in said


def test_no_model_of_timm_is_taken_for_another_librarys() -> None:
    models = load_index().models
    for name, lines in models.items():
        known = read_print(name, lines)
        assert not other_library({*known.core, *known.head}), name


def test_a_refusal_names_the_library(tmp_path: Path) -> None:
    for library, family, names in ROWS:
        torch.save({name: torch.zeros(2, 3) for name in names}, tmp_path / "w.pth")
        with pytest.raises(InputError, match=f"these are {library.split()[0]}"):
            open_source(str(tmp_path / "w.pth"))
        if library != TORCHVISION:
            assert family in normconvert.identify(tmp_path / "w.pth").origin


@pytest.mark.parametrize(
    ("name", "twin", "side"),
    [pytest.param("vgg11", "vgg11", 224, marks=pytest.mark.slow), ("regnet_y_400mf", "regnety_004", 64)],
)
def test_timms_twin_computes_what_torchvision_does(tmp_path: Path, name: str, twin: str, side: int) -> None:
    model: Any = getattr(torchvision.models, name)(weights=None, num_classes=7).eval()
    perturb(model)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    source = open_source(str(tmp_path / "w.pth"), arch=f"timm:{twin}")
    images = torch.randn(1, 3, side, side).double()
    with torch.no_grad():
        expected = model.double()(images)
        assert expected.shape == (1, 7)
        assert distance(source.load(dtype=torch.float64)(images), expected) < 1e-10
