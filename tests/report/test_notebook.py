"""A report in a notebook: a few lines, a page in a frame, rows for a table."""

from __future__ import annotations

import html
import re

import torch

import normconvert
from normconvert.plan.conversion_plan import Verdict
from tests.support.library_models import NanoGPT, ids
from tests.support.perturb import perturb


def test_a_report_is_a_few_lines_a_page_and_rows() -> None:
    model = perturb(NanoGPT(layers=4))
    model.get_submodule("transformer.h.3").register_forward_hook(lambda module, args, output: None)
    report = normconvert.inspect(model, example_inputs=(ids(),))
    assert repr(report) == "Report(NanoGPT: rmsnorm, 0 of 9 norms converted\n  9 stay: returned)"
    rows = report.to_records()
    assert [row["path"] for row in rows] == [v.path for v in report.plan.verdicts]
    assert rows[0].keys() == Verdict.__dataclass_fields__.keys()
    _, report = normconvert.convert_model(
        perturb(NanoGPT(layers=1)).to(torch.float64), example_inputs=(ids(),), verify="quick"
    )
    assert re.fullmatch(
        r"Report\(NanoGPT: rmsnorm, 3 of 3 norms converted\n  verified \(quick\): \d\.\de-1\d off in float64\)",
        repr(report),
    )
    shown = report._repr_html_()
    frame = re.search(r'<iframe srcdoc="([^"]*)"', shown)
    assert frame is not None
    page = html.unescape(frame[1])
    assert page.lstrip().startswith("<!doctype html>")
    assert "transformer.ln_f" in page
    assert "NanoGPT · torch · float64" in page
