"""The suite of right and wrong conversions, on one model: its mutations are wrong, and the verification says so."""

from __future__ import annotations

import pytest

from tools.census.verdict_cases import MUTATIONS, cases
from tools.census.verdicts import Tally, right, section, subjects, wrong


@pytest.mark.parametrize(
    "number", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)]
)
def test_right_ones_pass_and_wrong_ones_do_not(number: int) -> None:
    tally = Tally()
    subject = subjects(list(cases(None, quick=True))[number])[-1]
    right(subject, 1, tally)
    wrong(subject, 1, tally)
    assert not tally.refused
    assert tally.passed == {"standard": [], "quick": []}
    assert sum(tally.wrong["standard"].values()) >= 5
    assert set(tally.wrong["standard"]) <= set(MUTATIONS)
    assert "**0 of 1** right results refused" in section(tally)
