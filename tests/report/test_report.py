"""Alike rows told as one, without saying anything that is not so."""

from __future__ import annotations

import io
import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from normconvert.plan.conversion_plan import Plan, Verdict
from normconvert.report.console import show_fidelity, show_inspection, show_kept, show_summary
from normconvert.report.document import plain
from normconvert.result import Report
from normconvert.verification.fidelity import Fidelity
from normconvert.wording.grouping import Row, collapse, ranges
from normconvert.wording.words import human_bytes, percent


def collapsed(*rows: tuple[str, str]) -> list[tuple[str, str, int]]:
    return [(group.name, group.text, group.count) for group in collapse(Row(*row) for row in rows)]


def expanded(name: str) -> list[str]:
    """The names that ``a.{0-2,5}.b`` stands for."""
    parts = re.split(r"\{([\d,-]+)\}", name)
    sets = []
    for part in parts[1::2]:
        ends = [[int(n) for n in run.split("-")] for run in part.split(",")]
        sets.append([str(n) for run in ends for n in range(run[0], run[-1] + 1)])
    return [
        "".join(itertools.chain(*zip(parts[::2], (*choice, ""), strict=True))) for choice in itertools.product(*sets)
    ]


def test_layers_with_the_same_reason_are_one_line() -> None:
    rows = [(f"encoder.layers.{i}.norm{k}", f"reason {k}") for i in range(12) for k in (1, 2)]
    assert collapsed(*rows) == [
        ("encoder.layers.{0-11}.norm1", "reason 1", 12),
        ("encoder.layers.{0-11}.norm2", "reason 2", 12),
    ]


def test_a_number_of_the_reason_goes_with_the_layer() -> None:
    rows = [(f"h.{i}.ln", f"`h.{i}.attn.q2` reads it, after `h.{i - 1}.out`, width 64") for i in (1, 2, 3)]
    assert collapsed(*rows) == [("h.{1-3}.ln", "`h.{1-3}.attn.q2` reads it, after `h.{0-2}.out`, width 64", 3)]


def test_reasons_whose_numbers_do_not_go_with_the_layer_stay_apart() -> None:
    rows = [("s.0.ln", "width 64"), ("s.1.ln", "width 128"), ("s.2.ln", "width 64"), ("s.3.ln", "width 64")]
    assert collapsed(*rows) == [("s.{0,2,3}.ln", "width 64", 3), ("s.1.ln", "width 128", 1)]


def test_the_same_reader_for_all_layers_stays_that_reader() -> None:
    rows = [(f"h.{i}.ln", "`h.0.attn` reads it") for i in range(3)]
    assert collapsed(*rows) == [("h.{0-2}.ln", "`h.0.attn` reads it", 3)]


def test_a_group_names_no_layer_that_is_not_there() -> None:
    """Swin's stages have 2, 2, 6 and 2 blocks."""
    rows = [(f"layers.{s}.blocks.{b}.norm", "r") for s, n in enumerate((2, 2, 6, 2)) for b in range(n)]
    assert collapsed(*rows) == [
        ("layers.{0,1,3}.blocks.{0,1}.norm", "r", 6),
        ("layers.2.blocks.{0-5}.norm", "r", 6),
    ]


def test_only_numbers_that_are_whole_components_vary() -> None:
    assert [name for name, *_ in collapsed(("stage1.ln", "r"), ("stage2.ln", "r"), ("0", "r"), ("1", "r"))] == [
        "stage1.ln",
        "stage2.ln",
        "{0,1}",
    ]


def test_different_keys_are_never_one_line() -> None:
    assert len(collapse([Row("h.0.ln", "r", "LayerNorm"), Row("h.1.ln", "r", "BatchNorm2d")])) == 2


names = st.lists(st.sampled_from(["a", "norm1", "0", "1", "2", "3", "10"]), min_size=1, max_size=4).map(".".join)
texts = st.sampled_from(["", "width 2", "width 3", "`a.0` reads it", "`a.1` reads it", "1e-05 is 2"])


@given(st.lists(st.tuples(names, texts), max_size=24, unique_by=lambda row: row[0]))
def test_groups_stand_for_exactly_the_rows(rows: list[tuple[str, str]]) -> None:
    groups = collapse(Row(name, text) for name, text in rows)
    assert sorted(member for group in groups for member in group.members) == sorted(name for name, _ in rows)
    said = dict(rows)
    for group in groups:
        assert sorted(expanded(group.name)) == sorted(group.members)
        assert {said[member] for member in group.members} <= set(expanded(group.text))


def test_ranges_are_as_short_as_they_can_be() -> None:
    assert ranges([5, 0, 1, 2, 3, 9, 8]) == "0-3,5,8,9"


@pytest.mark.parametrize(
    ("size", "words"), [(0, "0 bytes"), (999, "999 bytes"), (2_674_944, "2.7 MB"), (548e6, "548 MB"), (14e9, "14.0 GB")]
)
def test_sizes_are_in_decimal_units(size: float, words: str) -> None:
    assert human_bytes(size) == words


def test_a_share_below_one_is_never_shown_as_all() -> None:
    assert [percent(1.0), percent(0.99999)] == ["100 %", "99.99 %"]


def test_json_has_no_numbers_that_json_lacks() -> None:
    assert plain({"a": [float("inf"), float("nan"), 1.5], "b": None}) == {"a": ["inf", "nan", 1.5], "b": None}


WHY = "`bert.encoder.layer.{}.attention.self.query` reads the normalised stream directly (Post-LN)."
PLAN = Plan(
    "rmsnorm",
    tensors={f"h.{i}.out.{leaf}": [{"op": "center", "axis": 0}] for i in range(12) for leaf in ("weight", "bias")},
    modules=[{"op": "center", "path": "embed", "side": "output", "key": "", "axis": -1}],
    verdicts=[
        *(Verdict(f"h.{i}.ln", "LayerNorm", True, "it reads a mean-free stream.", "converted") for i in range(12)),
        *(Verdict(f"bert.encoder.layer.{i}.ln", "LayerNorm", False, WHY.format(i), "post-norm") for i in range(12)),
    ],
)
FIDELITY = Fidelity(1e-3, 3.0, 0.5, 0.1, worst_module="h.3.mlp", passed=False, reasons=["float64 outputs differ"])


def printed(show: object, *arguments: object, **options: bool) -> str:
    console = Console(file=io.StringIO(), width=80, highlight=False, markup=False)
    show(console, *arguments, **options)  # type: ignore[operator]
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def test_everything_fits_eighty_columns() -> None:
    report = Report("src", "transformers", "TheModel", "rmsnorm", None, PLAN, FIDELITY, "float32", "bfloat16")
    text = (
        printed(show_summary, report)
        + printed(show_inspection, report)
        + printed(show_inspection, report, verbose=True)
    )
    text += printed(show_fidelity, "a", "b", FIDELITY)
    assert max(len(line) for line in text.splitlines()) <= 80


def test_kept_norms_are_collapsed_unless_all_are_wanted() -> None:
    short, long = printed(show_kept, PLAN), printed(show_kept, PLAN, verbose=True)
    assert "bert.encoder.layer.{0-11}.ln" in short
    assert "×12" in short
    assert len(short.splitlines()) < 8
    assert "bert.encoder.layer.7.ln" in long


def test_the_tree_shows_verdicts_and_centring_where_they_are() -> None:
    text = printed(show_inspection, Report("src", "transformers", "TheModel", "rmsnorm", None, PLAN))
    lines = {line.strip(" │├└─").split("  ")[0]: line for line in text.splitlines() if "──" in line}
    assert "✓ LayerNorm → RMSNorm  ×12" in lines["h.{0-11}.ln"]
    assert "✗ LayerNorm stays  ×12" in lines["bert.encoder.layer.{0-11}.ln"]
    assert "⊖ output centred" in lines["embed"]
    assert "h.{0-11}.out.weight|bias" in text


def test_a_failed_verification_says_where_and_why() -> None:
    text = printed(show_fidelity, "a", "b", FIDELITY)
    assert "failed" in text
    assert "h.3.mlp" in text
    assert "✗ float64 outputs differ" in text
