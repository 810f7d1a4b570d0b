"""The HTML report: what it says, that nothing in it comes to life, and how it behaves in a real browser."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import normconvert
from normconvert.cli import run
from normconvert.plan.conversion_plan import Plan, Verdict
from normconvert.report.blocks import model_blocks
from normconvert.report.charts import FLOOR, layer_chart, short
from normconvert.report.console import sparkline
from normconvert.report.document import check_document, error_document, fidelity_document, plain, report_document
from normconvert.report.html import ASSETS, html_report
from normconvert.result import Report
from normconvert.verification.divergence import comparable
from normconvert.verification.fidelity import Fidelity
from normconvert.verification.folder_comparison import Finding
from normconvert.verification.layer_measures import OUTPUT, Measures, layer_of, measure
from normconvert.verification.record_check import CheckReport
from tests.support.browser import DESKTOP, PHONE, Visit, chromium
from tests.support.tiny_checkpoints import gpt2, save

EVIL = """</script><script>alert(1)</script>"><img src=x onerror=alert(2)>{{ 7 * 7 }}{% raw %}`&lt;'\u2028"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("report")


@pytest.fixture(scope="module")
def bert(folder: Path) -> Path:
    """A BERT of which one norm converts and the others stay."""
    from transformers import BertConfig, BertForMaskedLM

    from tests.support.perturb import perturb

    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=32,
    )  # fmt: skip
    return save(perturb(BertForMaskedLM(config).eval()), folder / "bert")


@pytest.fixture(scope="module")
def reported(bert: Path, folder: Path) -> tuple[Path, dict[str, Any]]:
    """The report of a conversion by the command, and its document."""
    file, document = folder / "bert.html", folder / "bert.json"
    arguments = ["rmsnorm", str(bert), str(folder / "out"), "--report", str(file), "--json", str(document), "-q"]
    assert run(arguments) == 0
    return file, json.loads(document.read_text())


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


# What is measured


@pytest.fixture(scope="module")
def converted(folder: Path) -> tuple[Path, Path]:
    source = save(gpt2(), folder / "tiny-gpt2")
    normconvert.convert(source, folder / "gpt2-out", verify=False)
    return source, folder / "gpt2-out"


@pytest.fixture(scope="module")
def measures(converted: tuple[Path, Path]) -> Measures:
    return measure(*converted)


def test_every_layer_is_measured_and_agrees(measures: Measures) -> None:
    names = [layer.name for layer in measures.layers]
    assert [n for n in names if n.startswith("transformer.h.")] == ["transformer.h.0", "transformer.h.1"]
    assert names[-1] == OUTPUT
    for layer in measures.layers:
        assert layer.algebra < 1e-13
        assert layer.converted < 4 * max(layer.original, measures.eps)
    assert any(layer.original > 1e-9 for layer in measures.layers)  # the noise is really measured


def test_means_are_there_before_and_gone_after(measures: Measures) -> None:
    assert [norm.path for norm in measures.norms][:2] == ["transformer.h.0.ln_1", "transformer.h.0.ln_2"]
    assert len(measures.norms) == 5
    for norm in measures.norms:
        assert norm.before > 1e-2
        assert norm.after is not None
        assert norm.after < 1e-5
        assert norm.rms_after == pytest.approx(norm.rms_before, rel=0.5)
    assert measures.parameters["original"] == measures.parameters["converted"] > 0
    assert measures.perplexity is None  # there is no tokenizer


def test_an_error_shows_from_the_layer_it_is_in(converted: tuple[Path, Path], tmp_path: Path) -> None:
    source, out = converted
    shutil.copytree(out, tmp_path / "out")
    state = load_file(tmp_path / "out" / "model.safetensors")
    state["transformer.h.1.mlp.c_fc.weight"] *= 1.01
    save_file(state, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    layers = {layer.name: layer for layer in measure(source, tmp_path / "out").layers}
    assert layers["transformer.h.0"].converted < 1e-5
    assert layers["transformer.h.1"].converted > 1e-3
    assert layers[OUTPUT].converted > 1e-4
    assert layers[OUTPUT].original < 1e-5
    assert layers[OUTPUT].algebra < 1e-13  # the plan is right, the files are not


def test_modules_that_are_changed_on_purpose_are_no_error(folder: Path) -> None:
    """A fused convolution computes what its BatchNorm computed; what follows agrees again."""
    normconvert.convert("demo:convnet", folder / "fused", "fuse-bn", verify=False)
    found = measure("demo:convnet", folder / "fused")
    assert {"layer1.0", "layer4.0", "fc", OUTPUT} <= {layer.name for layer in found.layers}
    assert max(layer.algebra for layer in found.layers) < 1e-13
    assert all(norm.after is None for norm in found.norms)  # none is left to read anything
    assert found.parameters["converted"] < found.parameters["original"]


def test_perplexity_is_measured_on_text_where_there_is_a_tokenizer(folder: Path) -> None:
    normconvert.convert("demo:gpt2", folder / "king", verify=False)
    found = measure("demo:gpt2", folder / "king").perplexity
    assert found is not None
    assert 10 < found["original"] < 1000
    assert found["converted"] == pytest.approx(found["original"], rel=1e-4)
    assert found["tokens"] > 30


def test_what_is_changed_on_purpose_is_left_out_and_what_breaks_is_not() -> None:
    rows = [(f"m.{name}", differs) for name, differs in zip("abcde", (False, True, False, True, True), strict=True)]
    rows.append(("head", False))
    assert comparable(rows, trailing=True) == {0, 2, 3, 4, 5}
    assert comparable(rows, trailing=False) == {0, 2, 5}
    towers = [("t.text.a", True), ("t.text.b", True), ("t.image.a", False), ("t.image.b", False)]
    assert comparable(towers, trailing=True) == {0, 1, 2, 3}  # nothing of the text agrees after the break


def test_layers_are_elements_of_lists() -> None:
    assert layer_of("transformer.h.3.attn.c_attn") == "transformer.h.3"
    assert layer_of("layers.0.blocks.1.mlp.net.0") == "layers.0.blocks.1"
    assert layer_of("layer1.0.downsample.0") == "layer1.0"
    assert layer_of("transformer.wte") == "transformer.wte"


# What is shown


def test_the_report_says_what_was_done_and_why_not_elsewhere(reported: tuple[Path, dict[str, Any]]) -> None:
    file, document = reported
    page = Page(file.read_text())
    said = " ".join(page.text.split())
    assert "1 of 8" in said
    assert "encoder.layer.{0-2}" in said
    assert "reads the normalised stream directly (Post-LN)." in said
    assert "✗ LayerNorm stays ×3" in said
    for outcome in ("at most 1e-10", "at most 2", "rounding", "KL divergence", "top-1 the same"):
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


PLAN = Plan(
    "rmsnorm",
    modules=[{"op": "center", "path": "embed", "side": "output", "key": "", "axis": -1}],
    verdicts=[
        *(Verdict(f"h.{i}.ln", "LayerNorm", True, "it reads a mean-free stream.", "converted") for i in range(12)),
        Verdict("h.0.mid", "LayerNorm", False, "`h.0.q` reads it.", "linear"),
        Verdict("last", "LayerNorm", True, "it reads a mean-free stream.", "converted"),
    ],
)


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


SPREAD = {"median": 1.25, "low": 1.2, "high": 1.3}
BENCH: dict[str, Any] = {
    "command": "bench", "source": "demo:gpt2", "converted": "out", "library": "transformers", "architecture": "GPT2",
    "method": "rmsnorm", "norms": {"converted": 9, "total": 9}, "device": "cpu", "dtype": "float32",
    "machine": {"processor": "a processor", "threads": 1, "torch": "2.15"}, "parameter_bytes": {"original": 1000},
    "rows": [
        {
            "mode": "eager", "kind": "forward", "batch": batch, "length": 32, "rounds": 5, "calls": 1, "share": None,
            "milliseconds": {"original": SPREAD, "converted": SPREAD, "bound": SPREAD},
            "speedup": {"converted": SPREAD, "bound": SPREAD}, "peak_bytes": {"original": None}, "failures": {},
        }
        for batch in (1, 8)
    ],
}  # fmt: skip


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


WORTH: dict[str, Any] = {
    "examples": 3, "agreement": 0.9027, "kl": 0.37, "accuracy": 0.9055, "perplexity": None, "features": {},
}  # fmt: skip
DONE = {
    "status": "converted", "message": "", "norms": [9, 9], "seconds": 7.2,
    "figures": {"algebra": 5.8e-16, "rounding": 0.982, "top1": 1.0},
}  # fmt: skip
JOB = {"name": "gpt2", "variant": "rmsnorm", "recipe": "recipes/demo.yaml:6:5", "action": "convert", "result": DONE}
LOST: dict[str, Any] = {"status": "failed", "message": "has no LayerNorm", "norms": None, "seconds": 1.0, "figures": {}}
BATCH: dict[str, Any] = {
    "command": "run", "dry_run": False, "exit_status": 3, "seconds": 8.0,
    "counts": {"converted": 1, "skipped": 0, "failed": 1, "interrupted": 0},
    "jobs": [JOB, {**JOB, "name": "llama", "result": LOST}],
}  # fmt: skip


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
    (chart,) = json.loads(next(s for s in page.scripts if s.startswith("{"))).values()
    assert (chart["title"], chart["series"][0]["values"]) == ("Training", [0.5, 0.25])


# That nothing in it comes to life


def hostile() -> dict[str, dict[str, Any]]:
    """A document of every command, with every text in it trying to be markup."""
    row = {"probe": EVIL, "output": EVIL, "algebra": 1.0, "original_error": 1.0, "converted_error": 1.0}
    fidelity = Fidelity(1.0, 3.0, 0.5, 0.1, worst_module=EVIL, passed=False, reasons=[EVIL, f"`{EVIL}`"], probes=[row])
    verdicts = [Verdict(f"{EVIL}.{i}.{EVIL}", EVIL, i % 2 == 0, f"`{EVIL}` {EVIL}", EVIL) for i in range(4)]
    plan = replace(PLAN, verdicts=verdicts, modules=[{**PLAN.modules[0], "path": EVIL, "side": EVIL}], notes=[EVIL])
    report = Report(EVIL, "timm", EVIL, "rmsnorm", EVIL, plan, fidelity, EVIL, "x", seconds={EVIL: 1.0}, notes=(EVIL,))
    layer = {"name": EVIL, "algebra": 1e-16, "original": 1e-7, "converted": 1e-7}
    norm = {"path": EVIL, "converted": True, "before": 0.1, "after": 1e-8, "rms_before": 1.0, "rms_after": 1.0}
    found = {
        "probe": EVIL, "dtype": EVIL, "layers": [layer, layer], "norms": [norm, norm], "architecture": EVIL,
        "perplexity": {"original": 9.0, "converted": 9.0, "tokens": 9}, "library": EVIL,
        "parameters": {"original": 1, "converted": 1}, "bytes": {"original": 1, "converted": 1},
    }  # fmt: skip
    convert = {**report_document("rmsnorm", report), "measures": found, "command_line": EVIL}
    error = RuntimeError(EVIL)
    vars(error)["report"] = report
    checked = CheckReport(EVIL, EVIL, (Finding("weights", EVIL, EVIL, EVIL),), (EVIL,), 1, 1, {EVIL: 1.0})
    texts = {"prompt": EVIL, "original": EVIL, "converted": EVIL, "tokens": 3, "same": False}
    return {
        "convert": convert,
        "verify": {**fidelity_document(EVIL, EVIL, fidelity), "measures": found, "plan": plan.to_json()},
        "check": check_document(checked),
        "error": {**error_document(EVIL, 1, error), "command_line": EVIL},
        "export": {
            "command": "export",
            "source": EVIL,
            "file": EVIL,
            "dynamic": {EVIL: [EVIL]},
            "outputs": [EVIL],
            "error": 1e-7,
            "against": None,
            "bytes_written": 3,
            "notes": [EVIL],
        },
        "bench": {**BENCH, **dict.fromkeys(("source", "converted", "architecture", "library", "device"), EVIL)},
        "demo": {"command": "demo", "reports": [convert, convert], "text": texts, "digits": None},
        "swap": {
            "command": "swap", "source": EVIL, "out": EVIL, "architecture": EVIL, "library": EVIL, "method": EVIL,
            "eval_data": EVIL, "settings": {"data": EVIL}, "norms": {"swapped": [EVIL], "left": []}, "steps": 2,
            "figures": dict.fromkeys(("original", EVIL), WORTH), "fused": fidelity_document(EVIL, EVIL, fidelity),
            "trace": [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}], "seconds": {EVIL: 1.0}, "notes": [EVIL],
            "plan": plan.to_json(),
        },
        "run": {**BATCH, "jobs": [{**job, "name": EVIL, "variant": EVIL, "recipe": EVIL} for job in BATCH["jobs"]]},
    }  # fmt: skip


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


# In a browser


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
