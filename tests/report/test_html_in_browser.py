"""The HTML report in a real browser: at every width, in both colour schemes, and with nothing that comes to life."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from normconvert.report.document import plain
from normconvert.report.html import html_report
from tests.support.browser import DESKTOP, PHONE, Visit, chromium
from tests.support.report_documents import hostile


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESKTOP])
def test_the_page_works_at_every_width_and_in_both_schemes(
    browser: Any, reported: tuple[Path, dict[str, Any]], size: tuple[int, int], scheme: str
) -> None:
    visit = Visit(browser, reported[0], size, scheme)
    page = visit.page
    assert visit.overflow <= 0
    for number in (0, 1):
        chart = page.evaluate(
            f"""() => {{ const chart = Chart.getChart('chart-0-{number}');
            const pixels = chart.ctx.getImageData(0, 0, chart.canvas.width, chart.canvas.height).data;
            return {{type: chart.scales.y.type, series: chart.data.datasets.length, ink: pixels.some((v) => v > 0),
                     width: chart.canvas.clientWidth, line: chart.data.datasets[1].borderColor}} }}"""
        )
        assert chart["type"] == "logarithmic"
        assert chart["series"] == (4, 2)[number]
        assert chart["ink"]
        assert 250 < chart["width"] <= size[0]
    assert page.evaluate("[...document.querySelectorAll('.card > .scroll')].every(e => e.scrollWidth <= e.clientWidth)")
    light = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(246, 247, 249)"
    assert light is (scheme == "light")
    smallest = page.evaluate(
        "Math.min(...[...document.querySelectorAll('p, td, dd, li, .chip, .name')]"
        ".filter((e) => e.offsetParent).map((e) => parseFloat(getComputedStyle(e).fontSize)))"
    )
    assert smallest >= 13
    assert visit.complaints == []


def test_a_tap_or_a_pointer_shows_the_reason(browser: Any, reported: tuple[Path, dict[str, Any]]) -> None:
    for size in (PHONE, DESKTOP):
        visit = Visit(browser, reported[0], size)
        chip = visit.page.locator(".chip.kept").first
        why = visit.page.locator(".chip.kept + .why").first
        assert not why.is_visible()
        if size == PHONE:
            chip.tap()
        else:
            chip.hover()
        why.wait_for(state="visible")
        assert "reads the normalised stream directly" in why.inner_text()
        box = why.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= size[0]
        assert visit.complaints == []
    visit.page.mouse.move(0, 0)
    assert not why.is_visible()
    chip.focus()  # by the keyboard
    assert why.is_visible()


def test_a_change_of_the_scheme_recolours_the_charts(browser: Any, reported: tuple[Path, dict[str, Any]]) -> None:
    visit = Visit(browser, reported[0])
    line = "Chart.getChart('chart-0-0').data.datasets[1].borderColor"
    before = visit.page.evaluate(line)
    visit.page.emulate_media(color_scheme="dark")
    until = time.monotonic() + 10
    while visit.page.evaluate(line) == before:  # wait_for_function evaluates in the page, which its policy forbids
        assert time.monotonic() < until, "the chart kept its colour"
        visit.page.wait_for_timeout(20)
    assert visit.complaints == []


@pytest.mark.parametrize("command", list(hostile()))
def test_hostile_texts_do_nothing_in_a_browser(browser: Any, tmp_path: Path, command: str) -> None:
    file = tmp_path / "hostile.html"
    file.write_text(html_report(plain(hostile()[command])), encoding="utf-8")
    visit = Visit(browser, file, PHONE)
    visit.page.wait_for_timeout(100)
    assert visit.complaints == []
    assert visit.overflow <= 0
    assert visit.page.locator("img").count() == 0


def test_the_policy_stops_a_script_that_got_in_all_the_same(
    browser: Any, reported: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    file = tmp_path / "broken.html"
    source = reported[0].read_text()
    file.write_text(
        source.replace("<footer>", "<script>window.hacked = 1</script><img src=http://127.0.0.1:9/x><footer>")
    )
    visit = Visit(browser, file)
    assert visit.page.evaluate("window.hacked === undefined")
    assert any("Content Security Policy" in complaint for complaint in visit.complaints)
    assert visit.page.evaluate("Chart.getChart('chart-0-0') !== undefined")  # ours still run
