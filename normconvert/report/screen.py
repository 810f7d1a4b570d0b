"""Where output goes while a command runs: feedback to stderr, results to stdout, JSON where it is wanted.

In a terminal each stage is a bar; they vanish when the command is done. Anywhere else each
stage is one plain line.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

from normconvert import interrupts
from normconvert.errors import InputError, NormConvertError, as_bug
from normconvert.files.user_paths import STDOUT, user_path
from normconvert.report.document import error_document, plain
from normconvert.report.outputs import FileOutput
from normconvert.wording.printable import printable
from normconvert.wording.steps import Fact, Step

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status

    from normconvert.report.stage_bars import StageBars

INTERRUPTED = 130
BROKEN_PIPE = 141  # what a shell reports for a program that SIGPIPE ended


@dataclass(frozen=True)
class Done:
    """What a command has to show.

    Attributes:
        document: for ``--json``.
        show: prints it for a person.
        exit_status: 0, or 1 for a fidelity that is not given.
    """

    document: dict[str, Any]
    show: Callable[[Console], None]
    exit_status: int = 0


class Screen:
    """The two consoles of a command, and the live display on one of them.

    Args:
        json_file: where the JSON document goes: a file, ``-`` for stdout, None for none.
        verbose: 1 lists everything and lets the libraries speak, 2 adds tracebacks.
        quiet: only errors (and the JSON document).
        arguments: what the user typed behind ``normconvert``, for whoever wants to do it again; becomes a part of the
            document.
    """

    def __init__(
        self, *, json_file: str | None = None, verbose: int = 0, quiet: bool = False, arguments: Sequence[str] = ()
    ) -> None:
        self.arguments = arguments
        self.json_file = json_file
        self.outputs: list[FileOutput] = []
        """Files to be made from the command's document."""
        self.annotate: Callable[[dict[str, Any], Callable[[str], None]], None] | None = None
        """Called with the document and a function that prints, at the end of the command, however it ends."""
        if json_file is not None and json_file != STDOUT:
            self.outputs.append(FileOutput("--json", json_file, _json, '"exit_status"', arguments))
        self.verbose = verbose
        self.quiet = quiet
        for stream in (sys.stdout, sys.stderr):
            with suppress(AttributeError, ValueError):  # a terminal without UTF-8 gets "?" and no exception
                stream.reconfigure(errors="replace")  # type: ignore[union-attr]
        self.err = _console(sys.stderr)
        # With --json - stdout holds the document and nothing else, so that it can be piped into a parser.
        self.out = self.err if json_file == STDOUT else _console(sys.stdout)
        # Both are asked: with FORCE_COLOR rich takes a pipe for a terminal.
        self.live = self.err.is_interactive and sys.stderr.isatty() and not quiet
        self._display: Status | StageBars | None = None
        self.written: list[str] = []
        """Folders that are complete and stay, whatever happens next."""
        self._stage = ""
        self._coming: tuple[str, ...] = ()

    def stages(self, src: str, out: str | None = None, coming: Sequence[str] = ()) -> Callable[[str], None]:
        """A function to be called with each stage's name as it begins: ``open``, ``trace``, ``write``, ``verify``.

        Another name is shown as it is, and a :class:`~normconvert.wording.steps.Step` beside its stage's bar.

        Args:
            src: what is opened.
            out: what is written; None for nothing.
            coming: the stages that will come; without them, those of a conversion, or of an inspection.
        """
        self._coming = tuple(coming) or (("open", "trace", "write", "verify") if out else ("open", "trace"))
        texts = {
            "open": f"opening {src}",
            "trace": "tracing the model",
            "measure": "measuring the streams",
            "write": f"writing {out}",
            "verify": "verifying",
        }
        # While the hub downloads, its own bars are on the screen.
        downloads = not src.startswith("demo:") and not user_path(src).exists()

        def begin(stage: str) -> None:
            if isinstance(stage, Step):
                self._step(stage)
                return
            if isinstance(stage, Fact):
                self.begin(printable(" ".join(stage.split())))
                return
            if stage == self._stage:
                return
            text = texts.get(stage, stage)
            if self.live and not (stage == "open" and downloads):
                self._bars(stage == "open").begin(stage, text)
            else:
                self.say(text, spin=False)
            self._stage = stage
            if stage != "open":
                self.hush_bars()

        return begin

    def _bars(self, anew: bool = False) -> StageBars:
        """The bars on the screen; new ones if there are none, or for another model."""
        from normconvert.report.stage_bars import StageBars

        if anew or not isinstance(self._display, StageBars):
            self.clear()
            self._display = StageBars(self.err, self._coming)
        return self._display

    def _step(self, step: Step) -> None:
        from normconvert.report.stage_bars import StageBars

        if isinstance(self._display, StageBars):
            self._display.step(step)

    def say(self, text: str, *, spin: bool = True) -> None:
        """What is being done now: a spinner in a terminal, one line elsewhere."""
        self.clear()
        if self.quiet:
            return
        if self.live and spin:
            self._display = self.err.status(f"{printable(text)} …", spinner="dots", spinner_style="cyan")
            self._display.start()
        else:
            self.err.print(f"{printable(text)} ...", style="dim", soft_wrap=True)

    def begin(self, text: str) -> None:
        """What the command does: a line that stays, in a terminal too, with the seconds since the process began."""
        import psutil

        if not self.quiet:
            seconds = time.time() - psutil.Process().create_time()
            self.err.print(f"{seconds:.1f} s  {text}", style="dim", soft_wrap=True)

    def update(self, text: str) -> None:
        """Change the words beside the spinner, where there is one."""
        from rich.status import Status

        if isinstance(self._display, Status):
            self._display.update(f"{text} …")

    def progress(self, name: str, done: int, total: int) -> None:
        """One more tensor is written; ``done`` and ``total`` in bytes."""
        if not self.live:
            return
        from normconvert.report.stage_bars import StageBars

        if not isinstance(self._display, StageBars):
            self._bars().begin("write", "writing")
        self._bars().written(name, done, total)

    def clear(self) -> None:
        """Take the live display off the screen."""
        if self._display is not None:
            self._display.stop()
            self._display = None

    def hush(self) -> None:
        """Keep the libraries from writing on the terminal; to be called before they are imported."""
        if not self.live:
            # setdefault: who has set them knows why.
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        if self.verbose:
            return
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        # With -W or PYTHONWARNINGS somebody has asked for them.
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
        for library in ("transformers", "timm", "torch", "huggingface_hub"):
            logging.getLogger(library).setLevel(logging.ERROR)

    def hush_bars(self) -> None:
        """No "Loading weights" bars of transformers from here on; the hub's bars for downloads go with them."""
        module = sys.modules.get("transformers.utils.logging")
        if module is not None and not self.verbose:
            module.disable_progress_bar()

    def error(self, message: str) -> None:
        """``error: ...`` on stderr: one line, and below it whatever else the message holds."""
        self.clear()
        first, *rest = printable(message).split("\n")
        # Not by rich, which folds lines: an error is to be found by a search for its text.
        with suppress(OSError):
            print(f"error: {first}", *rest, sep="\n", file=sys.stderr, flush=True)

    def show(self, show: Callable[[Console], None]) -> None:
        """Print a result, without the blanks that fill rich's lines."""
        with self.out.capture() as captured:
            show(self.out)
        lines = printable(captured.get()).rstrip("\n").split("\n")
        self.out.file.write("".join(f"{line.rstrip()}\n" for line in lines))
        self.out.file.flush()

    def document(self, data: dict[str, Any]) -> None:
        """Write the JSON document where ``--json`` says, if it does, and everything else that is made from it.

        Raises:
            InputError: a file cannot be written.
        """
        command = {"command_line": shlex.join(["normconvert", *self.arguments])} if self.arguments else {}
        document = plain({**data, **command})
        if self.json_file == STDOUT:
            sys.stdout.write(_json(document))
            sys.stdout.flush()
        errors = []
        for output in self.outputs:
            try:
                output.write(document)
                self._wrote(output.path)
            except InputError as error:  # the others are still wanted
                errors.append(error)
        # Before an error is raised: the annotations do not need the file that failed.
        if self.annotate is not None:
            self.annotate(document, self._write)
        if errors:
            raise errors[0]

    def _wrote(self, path: str) -> None:
        if not self.quiet:
            self.err.print(f"wrote {printable(path)}", style="dim", soft_wrap=True)

    def check(self) -> None:
        """Refuse files that could not be written in the end.

        Raises:
            InputError: names the option and the reason.
        """
        for output in self.outputs:
            output.check()

    def _write(self, text: str) -> None:
        self.out.file.write(text)
        self.out.file.flush()


def execute(screen: Screen, action: Callable[[], Done]) -> int:
    """Run a command to its exit status: show what it returns, or the error that ended it.

    Returns:
        0 done; 1 fidelity failed; 2 bad input, or an exception nobody expected; 3 nothing converted; 130 interrupted,
        143 terminated.
    """
    done: Done | None = None
    try:
        # A report that cannot be written is to be known before the work that it tells of.
        screen.check()
        done = action()
        screen.clear()
        if not screen.quiet:
            screen.show(done.show)
        screen.document({**done.document, "exit_status": done.exit_status})
        sys.stdout.flush()
        return done.exit_status
    except KeyboardInterrupt as error:
        return _interrupted(screen, error)
    except Exception as error:
        # What was interrupted may have said so by an exception of its own.
        interruption = interrupts.take()
        if interruption is not None:
            return _interrupted(screen, interruption)
        return _failed(screen, error, done)
    finally:
        interrupts.take()


def _interrupted(screen: Screen, error: KeyboardInterrupt) -> int:
    screen.clear()
    left = f"{' and '.join(screen.written)} complete" if screen.written else "nothing was written"
    message = "; ".join(["interrupted", left, *map(str, error.args)])
    return _fail(screen, error, message, getattr(error, "exit_status", INTERRUPTED))


def _failed(screen: Screen, error: Exception, done: Done | None) -> int:
    if isinstance(error, NormConvertError):
        return _fail(screen, error, str(error), error.exit_status)
    if isinstance(error, (OSError, MemoryError)):
        # What was asked for is done, and only the telling failed: nobody reads, or a log's disk is full.
        if done is not None and screen.written:
            give_up_printing()
            return done.exit_status
        if isinstance(error, BrokenPipeError):
            # Whoever read our output has seen enough.
            give_up_printing()
            return BROKEN_PIPE
        return _fail(screen, error, " ".join(str(error).split()) or "out of memory", 2)
    return _fail(screen, error, as_bug(error, "" if screen.verbose > 1 else "; run with -vv"), 2)


def give_up_printing() -> None:
    """Let what cannot be printed vanish: Python would complain at exit about what it cannot flush."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _fail(screen: Screen, error: BaseException, message: str, status: int) -> int:
    screen.clear()
    if screen.verbose > 1:
        traceback.print_exception(error)
    if isinstance(error, KeyboardInterrupt):
        with suppress(OSError):
            print(printable(message), file=sys.stderr, flush=True)
    else:
        screen.error(message)
    try:
        # The document is due on failure as well: what called this reads the reason from it.
        screen.document(error_document(message, status, error))
    except (InputError, OSError) as another:
        if str(another) != str(error):  # the file that cannot be written may be the error itself
            screen.error(str(another))
    return status


def _json(document: dict[str, Any]) -> str:
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _console(file: TextIO) -> Console:
    from rich.console import Console

    # All off: names of tensors and files hold brackets and colons, which would be taken for mark-up.
    return Console(file=file, highlight=False, markup=False, emoji=False)
