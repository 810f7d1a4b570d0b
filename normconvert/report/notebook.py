"""A report in a notebook: the page of the HTML report in a frame of its own, under the line that sums it up."""

from __future__ import annotations

import html

from normconvert.report.document import plain, report_document
from normconvert.report.html import html_report
from normconvert.result import Report

HEIGHT = 640
"""Pixels of the frame, which scrolls."""


def in_frame(report: Report) -> str:
    """HTML for a cell's output.

    The frame has the page's own style and keeps it from the notebook's. Where frames are not shown, as on GitHub, the
    text above it is.
    """
    page = html_report(plain(report_document("convert", report)))
    text, frame = html.escape(repr(report)), html.escape(page, quote=True)
    return f'<pre>{text}</pre><iframe srcdoc="{frame}" style="width: 100%; height: {HEIGHT}px; border: 0"></iframe>'
