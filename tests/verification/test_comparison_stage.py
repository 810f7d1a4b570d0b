"""The edited model of an rmsnorm conversion is compared with the original's graph where it is verified, only there."""

from __future__ import annotations

from pathlib import Path

import pytest

from normconvert import convert
from normconvert.errors import FidelityError
from normconvert.rewrites import planning
from normconvert.rewrites.edited_trace import Differs
from tests.support.tiny_checkpoints import save_vit, vit


def test_a_difference_fails_the_verification_and_is_not_looked_for_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def differs(*given: object) -> None:
        raise Differs("head", "it is another head")

    monkeypatch.setattr(planning, "prove", differs)
    source = save_vit(vit(), tmp_path / "a")
    convert(source, tmp_path / "b", verify=False)
    with pytest.raises(FidelityError, match="the edited model is not the old one: it is another head"):
        convert(source, tmp_path / "c")
    assert not (tmp_path / "c").exists()
