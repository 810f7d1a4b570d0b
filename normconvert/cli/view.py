"""How a command shows what came of it: options that all commands share, and the screen that they make."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from normconvert.option_fields import option
from normconvert.options import TOLD

if TYPE_CHECKING:
    from normconvert.report.screen import Done, Screen


MEASURES = {"report_file": "Write an HTML report; measures every layer and norm for it."}
"""What ``--report`` does in the commands that call :meth:`View.measured`."""


def patient_threads() -> None:
    """Have threads of torch that wait for work sleep; to be called before it is imported.

    They spin otherwise: beside another busy process a model then takes several times as long to run.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@dataclass(frozen=True, kw_only=True)
class Output:
    """Where the result of a command goes."""

    json: str | None = option(None, "Write a JSON report; - for stdout.", metavar="FILE", panel=TOLD)
    verbose: int = option(
        0,
        "Say more, and let the libraries speak; -vv adds tracebacks.",
        short="v", metavar="", panel=TOLD, details={"count": True, "show_default": False},
    )  # fmt: skip
    quiet: bool = option(False, "Only errors.", short="q", panel=TOLD)

    def screen(self) -> Screen:
        """Where the command prints, with the libraries hushed."""
        from normconvert.cli.app import ARGUMENTS
        from normconvert.report.screen import Screen

        screen = Screen(json_file=self.json, verbose=self.verbose, quiet=self.quiet, arguments=ARGUMENTS.get())
        screen.hush()
        return screen

    def run(self, action: Callable[[Screen], Done]) -> int:
        """The exit status of a command that does ``action``: its result is shown, or the error that ended it."""
        from normconvert.report.screen import execute

        screen = self.screen()
        return execute(screen, lambda: action(screen))


@dataclass(frozen=True, kw_only=True)
class View(Output):
    """The same, with an HTML report."""

    report_file: str | None = option(None, "Write an HTML report.", spelling="--report", metavar="FILE", panel=TOLD)

    def screen(self) -> Screen:
        """The screen, with the report if one is wanted."""
        screen = super().screen()
        if self.report_file is not None:
            from normconvert.report.outputs import FileOutput

            screen.outputs.append(FileOutput("--report", self.report_file, _html, "<!doctype html>", screen.arguments))
        return screen

    def measured(self, screen: Screen, a: str, b: str | None, **options: Any) -> dict[str, Any]:
        """What a report needs beside the document of a command; nothing if none is wanted or nothing was written.

        Args:
            screen: of the command.
            a: the original.
            b: the converted checkpoint, None for none.
            options: of :func:`normconvert.verification.layer_measures.measure`.
        """
        if self.report_file is None or b is None:
            return {}
        from normconvert.errors import NormConvertError
        from normconvert.verification.layer_measures import measure

        screen.say("measuring every layer")
        try:
            found = measure(a, b, **options)
        except NormConvertError as error:
            return {"measures_error": str(error)}
        return {"measures": found.to_json(), "plan": found.plan.to_json() if found.plan is not None else None}


@dataclass(frozen=True, kw_only=True)
class CiView(View):
    """The same, for commands that a CI system runs."""

    junit: str | None = option(None, "Write JUnit XML, for CI systems.", metavar="FILE", panel=TOLD)
    markdown: str | None = option(None, "Write a summary for pull requests.", metavar="FILE", panel=TOLD)
    github: bool = option(False, "Annotate the GitHub job that this runs in.", panel=TOLD)

    def screen(self) -> Screen:
        """The screen, with what CI systems read."""
        from normconvert.report.github import github
        from normconvert.report.junit import junit
        from normconvert.report.markdown import markdown
        from normconvert.report.outputs import FileOutput

        screen = super().screen()
        kinds = (("--junit", self.junit, junit, "<testsuite"), ("--markdown", self.markdown, markdown, "### "))
        for name, file, render, mark in kinds:
            if file is not None:
                screen.outputs.append(FileOutput(name, file, render, mark, screen.arguments))
        screen.annotate = github if self.github else None
        return screen


def _html(document: dict[str, Any]) -> str:
    from normconvert.report.html import html_report

    return html_report(document)
