"""Broken input ends in one clear error: a few hundred inputs of the fuzz tool, with a fixed seed."""

from __future__ import annotations

from tools.fuzz.__main__ import fuzz


def test_broken_input_is_refused_or_taken() -> None:
    found = fuzz(300, seed=3)
    assert found.failures == []
    assert sum(found.counts.values()) >= 290
    assert sum(count for name, count in found.counts.items() if name.endswith("refused")) > 100
