"""The HTML report: what it says, that nothing in it comes to life, and how it behaves in a real browser."""

from __future__ import annotations

import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from normconvert.cli import run
from normconvert.report.blocks import model_blocks
from normconvert.report.charts import FLOOR, layer_chart, short
from normconvert.report.console import sparkline
from normconvert.report.document import plain
from normconvert.report.html import ASSETS, html_report
from tests.support.report_documents import BATCH, BENCH, JOB, PLAN, WORTH, hostile


class Page(HTMLParser):
    """Tags with their attributes, and the text between them (without scripts and styles)."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self._inside: str = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        self.text += " "
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data


def test_the_report_says_what_was_done_and_why_not_elsewhere(reported: tuple[Path, dict[str, Any]]) -> None:
    file, document = reported
    page = Page(file.read_text())
    said = " ".join(page.text.split())
    assert "1 of 8" in said
    assert "encoder.layer.{0-2}" in said
    assert "reads the normalised stream directly (Post-LN)." in said
    assert "✗ LayerNorm stays ×3" in said
    for outcome in ("at most 1e-10", "at most 3", "rounding", "KL divergence", "top-1 the same"):
        assert outcome in said
    assert f"normconvert rmsnorm {document['source']} {document['out']} --report {file}" in said
    assert f'model = normconvert.load("{document["out"]}")' in said
    for stage in ("open", "trace", "write", "verify"):
        assert re.search(rf"\b{stage} ?\d+\.\d\d s", said), stage
    assert "before, " in said
    charts = json.loads(next(s for s in page.scripts if s.startswith("{")))
    assert [chart["title"] for chart in charts.values()] == ["Error per layer", "Mean at each norm"]
    assert file.stat().st_size < 400_000


def test_the_terminal_says_the_same(bert: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["rmsnorm", str(bert), str(folder / "again"), "--overwrite", "--report", str(folder / "again.html")]
    assert run(arguments) == 0
    said = capsys.readouterr().out
    assert "└── encoder.layer.{0-2}" in said.replace("├", "└")
    assert "✗ LayerNorm stays  ×3" in said
    assert "Post-LN" in said
    said = " ".join(said.split())
    assert re.search(r"layers +float64 +[▁▂▃▄▅▆▇█]+ at most \de-1\d, at ", said)
    assert re.search(r"float32 +[▁▂▃▄▅▆▇█]+ at most \de-0\d, at ", said)
    assert re.search(r"noise +[▁▂▃▄▅▆▇█]+", said)


def test_other_commands_write_it_too(bert: Path, reported: tuple[Path, dict[str, Any]], folder: Path) -> None:
    out = str(folder / "out")
    for arguments, words in (
        (["inspect", str(bert)], ["1 of 8", "nothing written", "Post-LN"]),
        (["verify", str(bert), out], ["passed", "Error per layer", "against", "1 of 8"]),
        (["check", out, "--source", str(bert)], ["passed", "What was compared", "compared byte for byte"]),
    ):
        file = folder / f"{arguments[0]}.html"
        assert run([*arguments, "--report", str(file), "-q"]) == 0
        said = " ".join(Page(file.read_text()).text.split())
        for word in words:
            assert word in said, (arguments[0], word)
        assert f"normconvert {arguments[0]} " in said


def test_an_error_has_a_report_with_what_was_known(bert: Path, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "none.html"
    assert run(["rmsnorm", str(bert), str(tmp_path / "out"), "--require-all", "--report", str(file), "-q"]) == 3
    said = " ".join(Page(file.read_text()).text.split())
    assert "NothingToConvert" in said
    assert "7 of 8 norms cannot be converted" in said
    assert "✗ LayerNorm stays ×3" in said
    assert run(["rmsnorm", str(tmp_path / "gone"), str(tmp_path / "out"), "--report", str(file), "-q"]) == 2
    assert "InputError" in Page(file.read_text()).text


def test_the_model_is_drawn_in_its_order_with_alike_layers_once() -> None:
    top = model_blocks("Model", PLAN)
    assert list(top.children) == ["embed", "h.{0-11}.ln", "h.0.mid", "last"]
    (chip,) = top.children["h.{0-11}.ln"].chips
    assert (chip.state, chip.text, chip.count) == ("converted", "LayerNorm → RMSNorm", 12)
    assert [c.state for b in top.children.values() for c in b.chips] == ["centred", "converted", "kept", "converted"]


def test_charts_have_no_numbers_that_cannot_be_drawn() -> None:
    layer = {"name": "a", "algebra": "inf", "original": 0.0, "converted": float("nan")}
    chart = layer_chart({"layers": [layer], "dtype": "float32", "probe": "p"})
    assert chart is not None
    assert [series["values"][0] for series in chart["series"]][:3] == [FLOOR, None, None]
    assert layer_chart({"layers": [], "dtype": "float32", "probe": "p"}) is None
    assert short(["m.h.0", "m.h.1", "m.x.y", "output"]) == ["h.0", "h.1", "x.y", "output"]
    assert short(["a", "b"]) == ["a", "b"]


def test_sparklines_fit_their_width() -> None:
    assert sparkline([1e-16] * 5) == "▁▁▁▁▁"
    assert sparkline([]) == ""
    many = sparkline([10.0**-i for i in range(100)])
    assert len(many) <= 20
    assert (many[0], many[-1]) == ("█", "▁")
    assert sparkline([float("inf"), 1e-3, 1e-2])[1:] == "▁█"


def test_a_benchmark_is_shown_by_itself_and_beside_a_verification(converted: tuple[Path, Path], tmp_path: Path) -> None:
    said = " ".join(Page(html_report(BENCH)).text.split())
    for words in ("demo:gpt2 → out", "a processor, 1 thread, torch 2.15", "forward 8 × 32", "1.25 ms", "9 of 9"):
        assert words in said
    bench, file = tmp_path / "bench.json", tmp_path / "verify.html"
    arguments = ["verify", *map(str, converted), "--bench", str(bench), "--report", str(file), "-q"]
    bench.write_text(json.dumps(BENCH))
    assert run(arguments) == 0
    page = Page(file.read_text())
    charts = json.loads(next(s for s in page.scripts if s.startswith("{")))
    assert [chart["title"] for chart in charts.values()] == ["Error per layer", "Mean at each norm", "Speed"]
    assert charts["chart-1-0"]["series"][0]["values"] == [1.25, 1.25]
    bench.write_text('{"command": "bench"}')
    assert run(arguments) == 2


def test_a_batch_is_a_table_of_its_jobs_and_the_reasons_of_those_that_failed() -> None:
    said = " ".join(Page(html_report(BATCH)).text.split())
    assert "2 conversions ✗ failed recipes/demo.yaml converted 1 failed 1" in said
    assert "Why it failed llama rmsnorm: has no LayerNorm" in said
    assert "norms algebra rounding top-1 time gpt2 rmsnorm 9 of 9 5.8e-16 0.982 × 100 % 7.2 s" in said
    planned = {**BATCH, "dry_run": True, "exit_status": 0, "jobs": [{**JOB, "result": None}]}
    assert "nothing written" in Page(html_report(planned)).text


def test_a_swap_says_what_it_is_worth_beside_the_original() -> None:
    document = {**plain(hostile()["swap"]), "figures": {"original": {**WORTH, "agreement": 1.0}, "tuned": WORTH}}
    page = Page(html_report(document))
    said = " ".join(page.text.split())
    assert "not lossless" in said
    assert "agreement accuracy KL (nats) original 100 % 90.55 % 0.37 tuned 90.27 % 90.55 % 0.37" in said
    assert "Worst losses, original → swapped 50 % max" in said
    assert "1 → 1.25 2 → ∞" in said
    (chart,) = json.loads(next(s for s in page.scripts if s.startswith("{"))).values()
    assert (chart["title"], chart["series"][0]["values"]) == ("Training", [0.5, 0.25])


@pytest.mark.parametrize("command", list(hostile()))
def test_hostile_texts_stay_text(command: str) -> None:
    source = html_report(plain(hostile()[command]))
    page = Page(source)
    assert "img" not in [tag for tag, _ in page.tags]
    charted = command not in ("check", "error", "export", "run")
    assert len(page.scripts) == (3 if charted else 1)  # the data, Chart.js and our own
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert "<script>alert(1)</script>" in page.text
    assert "{{ 7 * 7 }}" in page.text
    assert "49" not in page.text
    assert "\u2028" not in page.scripts[0]


def test_the_report_asks_for_nothing_from_anywhere(reported: tuple[Path, dict[str, Any]]) -> None:
    page = Page(reported[0].read_text())
    for _, attributes in page.tags:
        for name in ("src", "href", "srcset", "action"):
            assert attributes.get(name) in (None, "data:,")
    style = re.search(r"<style>(.*?)</style>", reported[0].read_text(), re.DOTALL)
    assert style
    assert "url(" not in style[1]
    assert "@import" not in style[1]


def test_the_chart_library_is_the_published_file() -> None:
    digest = hashlib.sha256((ASSETS / "chart.umd.min.js").read_bytes()).hexdigest()
    assert digest in (ASSETS / "README.md").read_text()
    assert "Permission is hereby granted, free of charge" in (ASSETS / "chart.LICENSE.md").read_text()
