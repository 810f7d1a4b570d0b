"""The step in a CI system: limits, JUnit, Markdown, annotations, exit status; hostile names come to no life."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import normconvert
from normconvert.cli import run
from normconvert.errors import InputError
from normconvert.files.yaml_file import read_yaml
from normconvert.report.document import error_document, fidelity_document
from normconvert.report.github import annotation_lines
from normconvert.report.junit import junit
from normconvert.report.markdown import code, markdown, text
from normconvert.verification.fidelity import Fidelity
from normconvert.verification.limits import FIGURES, check_limits, judge_limits, outcomes, read_limits

GOOD = Fidelity(
    1e-15, 1.0, 1.0, 1e-12, mean_over_rms=1e-8,
    probes=[{"probe": "random", "output": "logits", "algebra": 1e-15, "original_error": 2e-7, "converted_error": 1e-7}],
)  # fmt: skip
EVIL = "x`|<script>alert(1)</script>|@someone ::error::\n]]>&\x00\x1b[31m\ud800"


# Limits


def limits_file(tmp_path: Path, text: str) -> Path:
    (tmp_path / "limits.yaml").write_text(text)
    return tmp_path / "limits.yaml"


def test_limits_are_read_as_they_are_meant(tmp_path: Path) -> None:
    """PyYAML alone takes 1e-10 for a word."""
    file = limits_file(tmp_path, "algebra: 1e-10  # at most\nrounding: 2\ntop1: .999\nkl: 1.5E-6\nloss_difference: 0\n")
    assert read_limits(file) == {"algebra": 1e-10, "rounding": 2.0, "top1": 0.999, "kl": 1.5e-6, "loss_difference": 0.0}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("algebra: 1e-10\nroundng: 2\n", ":2:1: unknown key 'roundng'; nearest: rounding"),
        ("something: 2\n", ":1:1: unknown key 'something'; expected one of algebra, rounding, top1"),
        ("algebra: 1e-10\n\ntop1: 99.9\n", ":3:1: top1: expected 0 to 1, found 99.9"),
        ("kl: -1\n", ":1:1: kl: expected 0 or more, found -1"),
        ("kl: .nan\n", ":1:1: kl: expected 0 or more, found nan"),
        ("kl: small\n", ":1:1: kl: expected a number, found 'small'"),
        ("kl: true\n", ":1:1: kl: expected a number, found True"),
        ("kl: 1\n  top1: 1\n", ":2:7: not valid YAML: "),
        ("kl: 1\nkl: 2\n", ":2:1: key 'kl' is there twice, first at line 1"),
        ("", ":1:1: expected keys with values (algebra"),
        ("- kl\n", ":1:1: expected keys with values (algebra"),
        ("kl: !!python/object/apply:os.system [ls]\n", "not valid YAML: could not determine a constructor"),
        ("? {a: 1}\n: 2\n", ":1:3: a key has to be a plain word"),
        ("a: &x [*x]\n", ""),
    ],
)
def test_a_limits_file_that_is_wrong_is_one_line_with_its_place(tmp_path: Path, content: str, words: str) -> None:
    file = limits_file(tmp_path, content)
    with pytest.raises(InputError) as caught:
        read_limits(file)
    assert str(caught.value).startswith(str(file))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_limits_that_cannot_be_read_are_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        read_limits(tmp_path / "none.yaml")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not a text file"):
        read_limits(tmp_path / "binary")
    with pytest.raises(InputError, match="unknown figure 'topp1'; nearest: top1"):
        check_limits({"topp1": 1.0})
    with pytest.raises(InputError, match="top1: expected 0 to 1"):
        check_limits({"top1": 2.0})


def test_places_of_nested_entries_are_known(tmp_path: Path) -> None:
    file = read_yaml(limits_file(tmp_path, "jobs:\n  - name: a\n    with:\n      top: 1\n  - b\n"))
    assert file.data == {"jobs": [{"name": "a", "with": {"top": 1}}, "b"]}
    assert file.places[("jobs", 0, "with", "top")] == (4, 7)
    assert file.places[("jobs", 1)] == (5, 5)
    with pytest.raises(InputError, match=r":4:7: unknown key 'top'; nearest: stop"):
        file.check_keys(["stop"], ("jobs", 0, "with"))


@pytest.mark.parametrize(
    ("fidelity", "limits", "broken"),
    [
        (GOOD, {}, []),
        (GOOD, {"kl": 1e-12, "top1": 1.0}, []),
        (GOOD, {"kl": 1e-13}, ["kl is 1e-12, allowed: at most 1e-13"]),
        (replace(GOOD, top1=0.9999), {"top1": 1.0}, ["top1 is 0.9999, allowed: at least 1"]),
        (replace(GOOD, loss_difference=-0.5), {"loss_difference": 0.1}, ["loss_difference is -0.5"]),
        (GOOD, {"loss_difference": 0.1}, ["loss_difference is not measured"]),
        (replace(GOOD, rounding=None), {"rounding": 2.0}, ["rounding is not measured"]),
        (replace(GOOD, kl=float("nan")), {"kl": 1.0}, ["kl is nan"]),
        (replace(GOOD, mean_over_rms=float("inf")), {"mean_over_rms": 1.0}, ["mean_over_rms is inf"]),
    ],
)
def test_a_limit_is_kept_or_the_verification_fails(
    fidelity: Fidelity, limits: dict[str, float], broken: list[str]
) -> None:
    judged = judge_limits(fidelity, limits)
    assert judged.passed is (not broken)
    assert len(judged.reasons) == len(broken)
    for reason, words in zip(judged.reasons, broken, strict=True):
        assert reason.startswith(words)
    failed = [outcome.figure.name for outcome in outcomes(judged.to_json()) if outcome.passed is False]
    assert failed == [words.split()[0] for words in broken]


def test_limits_replace_the_defaults(pair: tuple[Path, Path]) -> None:
    source, out = pair
    default = normconvert.verify(source, out)
    assert default.passed
    strict = normconvert.verify(source, out, limits={"rounding": 1e-3, "algebra": 1e-18})
    assert not strict.passed
    assert [reason.split(" (")[0].split(" by ")[0].split(" are ")[0] for reason in strict.reasons] == [
        "float64 outputs differ",
        "rounding errors",
    ]
    assert (strict.tolerance, strict.rounding_tolerance) == (1e-18, 1e-3)


# The files


def bad() -> dict[str, Any]:
    """A failed verification under names that try everything."""
    fidelity = judge_limits(replace(GOOD, passed=False, reasons=[f"about `{EVIL}` and {EVIL}"]), {"kl": 1e-13})
    rows = [{**GOOD.probes[0], "probe": EVIL, "output": EVIL}]
    return fidelity_document(EVIL, EVIL, replace(fidelity, probes=rows))


def check_of(*findings: dict[str, str]) -> dict[str, Any]:
    return {
        "command": "check", "output": "out/x", "source": EVIL, "findings": list(findings), "notes": [EVIL],
        "passed": not findings, "files": 3, "bytes": 10,
    }  # fmt: skip


def test_junit_has_a_case_for_each_figure() -> None:
    document = fidelity_document("a", "b", judge_limits(replace(GOOD, rounding=None), {"kl": 1e-13}))
    root = ElementTree.fromstring(junit(document))
    (suite,) = root
    cases = {str(case.get("name")).partition(":")[0]: case for case in suite.iter("testcase")}
    assert list(cases) == [*(figure.name for figure in FIGURES), "probes"]
    (failure,) = suite.iter("failure")
    assert failure is cases["kl"][0]
    assert failure.get("message", "").startswith("kl is 1e-12, allowed: at most 1e-13")
    assert [name for name, case in cases.items() if case.find("skipped") is not None] == ["rounding", "loss_difference"]
    for element in (root, suite):
        assert [element.get(key) for key in ("tests", "failures", "errors", "skipped")] == ["7", "1", "0", "2"]
    assert junit(document) == junit(document)


def test_junit_names_the_probe_that_does_not_run() -> None:
    reason = "the converted model cannot run probe 'long', which the original runs: IndexError"
    root = ElementTree.fromstring(junit(fidelity_document("a", "b", replace(GOOD, passed=False, reasons=[reason]))))
    (failure,) = root.iter("failure")
    assert failure.get("message") == reason


def test_junit_of_a_check_has_a_case_for_each_part() -> None:
    finding = {"part": "weights", "name": "h.0.w", "file": "m.safetensors", "what": "differs"}
    (suite,) = ElementTree.fromstring(junit(check_of(finding, {**finding, "name": "h.1.w"})))
    cases = {str(case.get("name")).partition(":")[0]: case for case in suite.iter("testcase")}
    assert list(cases) == ["record", "source", "plan", "weights", "config", "files"]
    assert [name for name, case in cases.items() if len(case)] == ["weights"]
    assert cases["weights"][0].text == "h.0.w in m.safetensors differs\nh.1.w in m.safetensors differs"


def test_hostile_names_stay_text_in_junit() -> None:
    finding = {"part": "files", "name": EVIL, "file": EVIL, "what": EVIL}
    for document in (bad(), check_of(finding), error_document(EVIL, 2)):
        written = junit(document).encode("utf-8", "strict")
        root = ElementTree.fromstring(written)  # well-formed: no control characters, no element that is not ours
        known = {
            "testsuites",
            "testsuite",
            "properties",
            "property",
            "testcase",
            "failure",
            "skipped",
            "system-out",
            "error",
        }
        assert {element.tag for element in root.iter()} <= known
        assert "<script>alert(1)</script>" in "".join(str(e.attrib) + (e.text or "") for e in root.iter())


def rendered(source: str) -> str:
    """The HTML that a CommonMark parser with tables makes of it."""
    from markdown_it import MarkdownIt

    html: str = MarkdownIt("commonmark").enable("table").render(source)
    return html


def test_markdown_shows_every_figure_and_the_verdict() -> None:
    page = rendered(markdown(fidelity_document("org/a", "out", judge_limits(GOOD, {"kl": 1e-13}))))
    assert "❌ not faithful: <code>out</code> against <code>org/a</code>" in page
    rows = re.findall(r"<tr>\s*<td>(.*?)</tr>", page, re.DOTALL)
    assert len(rows) == len(FIGURES) + 1
    cells = [re.sub(r"\s*</?td>\s*", "|", row).strip("|") for row in rows]
    assert cells[3] == "<code>kl</code>||KL divergence (nats)||1e-12||at most 1e-13||❌"
    assert cells[5].startswith("<code>mean_over_rms</code>|||mean|/rms at")
    assert "✅ faithful" in markdown(fidelity_document("a", "b", GOOD))


def test_hostile_names_stay_text_in_markdown() -> None:
    finding = {"part": "files", "name": EVIL, "file": EVIL, "what": EVIL}
    for document in (bad(), check_of(finding), error_document(EVIL, 2)):
        page = rendered(markdown(document))
        assert "<script" not in page
        assert "&lt;script&gt;alert(1)" in page
        table = {"table", "thead", "tbody", "tr", "th", "td"}
        assert set(re.findall(r"<(\w+)", page)) <= {"h3", "p", "ul", "li", "em", "code", "details", "summary"} | table
        assert "@someone" not in re.sub("<code>.*?</code>", "", page)  # nobody is called
    # a table keeps its columns whatever its cells hold
    assert len({row.count("<td") for row in rendered(markdown(bad())).split("<tr>") if "<td" in row} - {0}) <= 2


@pytest.mark.parametrize("value", ["", "a", "`", "a`b", "``x`", " lead", "<b>", "x\ny", "|"])
def test_code_shows_exactly_the_text(value: str) -> None:
    import html

    (shown,) = re.findall("<code>(.*?)</code>", rendered(f"- {code(value)} end"), re.DOTALL) or [""]
    assert html.unescape(shown).strip() == " ".join(value.split())


def test_text_keeps_our_code_and_nothing_else() -> None:
    assert rendered(text("`h.{0-2}` reads it_ *all* [x](http://y) <b>")).strip() == (
        "<p><code>h.{0-2}</code> reads it_ *all* [x](http:\u2060//y) &lt;b&gt;</p>"
    )


def test_annotations_are_one_line_each_and_cannot_be_broken_out_of() -> None:
    finding = {"part": "files", "name": EVIL, "file": EVIL, "what": EVIL}
    for document in (bad(), check_of(finding), error_document(EVIL, 2)):
        lines = list(annotation_lines(document))
        assert lines
        for line in lines:
            assert "\n" not in line
            assert "\r" not in line
            match = re.fullmatch(r"::error ([^:]*)::(.*)", line)
            assert match, line
            assert all(re.fullmatch(r"(title|file)=[^,:]*", part) for part in match[1].split(","))
    (good,) = annotation_lines(fidelity_document("a", "b", GOOD))
    assert good.startswith("::notice title=normconvert verify::b is faithful to a: algebra 1e-15, rounding 1, ")
    many = [{"part": "files", "name": f"f{i}", "file": f"f{i}", "what": "differs"} for i in range(50)]
    lines = list(annotation_lines(check_of(*many)))
    assert len(lines) == 10
    assert lines[0] == "::error file=out/x/f0,title=normconvert check::f0 differs"
    assert lines[-1].endswith("and 41 more findings")


# The command


def test_verify_writes_all_of_it_and_says_so_by_its_status(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = map(str, pair)
    junit_file, markdown_file, summary = (tmp_path / name for name in ("report.xml", "summary.md", "step.md"))
    summary.write_text("what another step said\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    limits = limits_file(tmp_path, "algebra: 1e-10\nrounding: 2\ntop1: 1\nkl: 1e-6\n")
    ci = ["--junit", str(junit_file), "--markdown", str(markdown_file), "--github"]
    assert run(["verify", source, out, "--limits", str(limits), *ci]) == 0
    assert "::notice title=normconvert verify::" in capsys.readouterr().out
    assert ElementTree.parse(junit_file).getroot().get("failures") == "0"
    assert "✅ faithful" in markdown_file.read_text()
    assert summary.read_text() == f"what another step said\n{markdown_file.read_text()}\n"

    limits.write_text("kl: 0\n")
    assert run(["verify", source, out, "--limits", str(limits), *ci, "--json", "-"]) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["limits"] == {"kl": 0.0}  # stdout is the document alone
    assert "::error title=normconvert verify::kl is " in captured.err
    assert ElementTree.parse(junit_file).getroot().get("failures") == "1"


def test_bad_input_is_told_to_ci_too(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = limits_file(tmp_path, "top: 1\n")
    status = run(["verify", *map(str, pair), "--limits", str(limits), "--junit", str(tmp_path / "r.xml"), "--github"])
    assert status == 2
    captured = capsys.readouterr()
    assert f"error: {limits}:1:1: unknown key 'top'; nearest: top1" in captured.err
    assert "::error title=normconvert::" in captured.out
    root = ElementTree.parse(tmp_path / "r.xml").getroot()
    assert (root.get("errors"), root.get("tests")) == ("1", "1")


@pytest.mark.parametrize("option", ["--junit", "--markdown", "--json"])
def test_a_file_that_cannot_be_written_is_said_before_the_work_and_once(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    (tmp_path / "folder").mkdir()
    for path, reason in ((tmp_path / "no" / "x", "its folder does not exist"), (tmp_path / "folder", "is a folder")):
        assert run(["verify", *map(str, pair), option, str(path)]) == 2
        assert capsys.readouterr().err == f"error: {option} {path}: cannot be written: {reason}\n"
