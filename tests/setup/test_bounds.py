"""The lowest versions that pyproject.toml states: one for each package, kept by what is installed, seen by `compat`."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, requires, version

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from normconvert.compat import timm, torch, transformers
from tools.setup.lowest import PYPROJECT, lowest

BOUNDS = lowest(PYPROJECT.read_text("utf-8"))
IN_LOWEST = sys.prefix.endswith("-lowest")


def installed(name: str) -> Version | None:
    try:
        return Version(version(name))
    except PackageNotFoundError:  # of an extra
        return None


def test_two_bounds_of_one_package_are_refused() -> None:
    text = '[project]\ndependencies = ["a>=1"]\n[project.optional-dependencies]\nx = ["a>=2"]\n[tool.x]\n'
    with pytest.raises(ValueError, match="a: two lower bounds, 1 and 2"):
        lowest(text)


@pytest.mark.parametrize("name", BOUNDS)
def test_what_is_installed_keeps_the_bound(name: str) -> None:
    found = installed(name)
    if found is None:
        pytest.skip(f"{name} is not installed here")
    bound = Version(BOUNDS[name])
    # "5.6" is 5.6.0, in the environment of the lowest versions.
    assert found == bound if IN_LOWEST else found >= bound


def test_no_bound_is_below_what_another_package_needs_of_it() -> None:
    """Of the versions that are installed: in the environment of the lowest ones, of the bounds themselves."""
    below: list[str] = []
    for name in BOUNDS:
        for line in requires(name) or [] if installed(name) is not None else []:
            need = Requirement(line)
            found = installed(need.name)
            wanted = need.marker is None or need.marker.evaluate({"extra": ""})
            if wanted and found is not None and not need.specifier.contains(found, prereleases=True):
                below.append(f"{name} needs {need}, and {found} is installed")
    assert not below


@pytest.mark.parametrize("module", [torch, transformers, timm], ids=lambda m: m.__name__.rpartition(".")[2])
def test_private_names_were_seen_in_the_lowest_version(module: object) -> None:
    for name in module.NAMES:  # type: ignore[attr-defined]
        if name.without == "refused, naming the version":
            assert Version(name.seen.split(", ")[0]) == Version(BOUNDS[name.library]), name.path


def test_torchvision_is_that_of_torch() -> None:
    """0.N is made for 2.(N - 15) and needs just that: bounds that are not a pair cannot be installed together."""
    torch_bound, vision_bound = Version(BOUNDS["torch"]), Version(BOUNDS["torchvision"])
    assert (torch_bound.major, torch_bound.minor) == (2, vision_bound.minor - 15)
