"""The live display: a bar for each stage, its steps, and an estimate of what is left; nothing without a terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from normconvert.report.screen import Screen
from normconvert.report.stage_bars import StageBars
from normconvert.wording.steps import Fact, Step


def shown(bars: StageBars) -> list[str]:
    """The lines as they stand on the screen."""
    console = Console(file=io.StringIO(), width=140)
    console.print(bars._progress.get_renderable())
    return [" ".join(line.split()) for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


@pytest.fixture
def bars() -> StageBars:
    return StageBars(Console(file=io.StringIO()), ("open", "trace", "write", "verify"))


def test_each_stage_has_a_line_with_its_step_and_what_is_left(bars: StageBars) -> None:
    bars.begin("open", "opening a[b]")
    assert "left" not in shown(bars)[0], "nothing is known yet"
    bars.step(Step("building the model", 1, 2))
    assert "building the model" in shown(bars)[0]
    assert "~1 s left" in shown(bars)[0]
    bars.begin("write", "writing out")
    bars.written("h.0.weight", 500, 1000)
    opening, writing = shown(bars)
    assert "✓ opening a[b]" in opening
    assert "left" not in opening
    assert " of " in writing
    assert "B/s" in writing
    bars.begin("verify", "verifying")
    bars.step(Step("the original, probe 'text'", 3, 4))
    assert "probe 'text'" in shown(bars)[2]
    task = bars._progress.tasks[-1]
    assert (task.completed, task.total) == (3, 4)
    bars.stop()


def test_an_estimate_counts_the_stages_that_will_come(bars: StageBars) -> None:
    def left(stages: tuple[str, ...]) -> int:
        some = StageBars(Console(file=io.StringIO()), stages)
        some._start -= 100
        some.begin("trace", "tracing")
        some.stop()
        return int(some._progress.tasks[-1].fields["left"].split()[0][1:])

    assert left(("open", "trace")) < left(("open", "trace", "write", "verify"))
    bars.stop()


def test_without_a_terminal_a_stage_is_one_plain_line(capsys: pytest.CaptureFixture[str]) -> None:
    stage = Screen().stages("demo:gpt2", "out")
    for name in ("open", Step("building the model", 1, 2), "trace", "trace", Step("planning", 1, 2), "write", "verify"):
        stage(name)
    assert capsys.readouterr().err.splitlines() == [
        "opening demo:gpt2 ...", "tracing the model ...", "writing out ...", "verifying ...",
    ]  # fmt: skip


def test_what_is_known_already_is_a_line_that_stays(capsys: pytest.CaptureFixture[str]) -> None:
    stage = Screen().stages("a")
    stage("open")
    stage(Fact("Mine (timm) in a[b]\n::error::"))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "opening a ..."
    assert lines[1].endswith(" s  Mine (timm) in a[b] ::error::")
    assert len(lines) == 2
