"""What a user may choose, each option defined once.

An option is a field of a *request*, a frozen dataclass: its name, type and default are the field's, its help and limits
stand in the field's :class:`normconvert.option_fields.About`. Whatever else lists options is made from that: see there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

from normconvert.errors import InputError, first_line
from normconvert.option_fields import check_options, option, parse_size

METHODS: Mapping[str, str] = {
    "rmsnorm": "LayerNorm", "crmsnorm": "LayerNorm", "fuse-bn": "BatchNorm",
    "fold": "LayerNorm or RMSNorm", "rotate": "LayerNorm or RMSNorm", "scale": "LayerNorm or RMSNorm",
}  # fmt: skip
"""Conversion -> the norm that it looks for, in words."""

SETS = ("ema", "model")
"""Which weights of a checkpoint of training: averaged, or as they were trained."""
OF_TENSORS = ("fold", "rotate", "scale")
"""Conversions that change numbers alone, tensors and epsilons: no operation, and no speed."""

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""How weights may be stored; ``auto`` is each tensor's own."""
SHORT_DTYPES: Mapping[str, str] = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

SOURCE, PLANNED, WRITTEN = "What is read", "What may change", "What is written"
CHECKED, TOLD = "How it is checked", "What is told"
"""Headings of the help under which options stand."""

ROTATIONS = ("hadamard", "random")
"""Orthogonal maps: see `normconvert.plan.rotations`."""

MOST_POWER = 60
"""The largest power of a stream, up or down: a norm squares it, and float32 has 2^-126 to 2^127."""

SEEDS = 1 << 64
"""How many there are: torch draws from no other."""

FORMS = ("graph", "llm-compressor", "awq")
"""What an anatomy is written as."""

LEVELS = ("quick", "standard", "thorough")
LEVEL = "How much is verified: quick runs two inputs, standard each kind once, thorough all, and long ones."

DEFAULTS: Mapping[str, Mapping[str, Any]] = {"crmsnorm": {"tied": "untie", "min_gain": 2}}
"""Conversion -> what its options are if the user does not say, where that differs from the general default."""

Stage = Callable[[str], None]
"""Called with the name of each stage as it begins: ``open``, ``trace``, ``write``, ``verify``; and within a
stage with what is done next, a :class:`normconvert.wording.steps.Step`, or, by an inspection, with what is known of
the source already, a :class:`normconvert.wording.steps.Fact`."""

SRC = "Hub id (org/name, @revision), folder, weight file, or demo:NAME."
OUT = "The folder to make; it appears complete or not at all."
OVERWRITE = "Replace an OUT that exists, once the new one is whole."
METHOD = ", ".join(METHODS)
REVISION = "Branch, tag or commit on the hub."
TRUST = "Let code that comes with a checkpoint run."

GIVEN = "The file that the rotation was read from (rotate --rotation FILE)."

EXAMPLE = (
    "How the model is called: a tuple, a dict of keyword arguments, or a list of these for several calls; models of "
    "transformers and timm need none."
)


class Network(Protocol):
    """A model in memory, a ``torch.nn.Module``; torch is imported late."""

    training: bool

    def eval(self) -> Any:
        """As torch has it."""


def powers_in(text: str | None) -> int | dict[str, int] | None:
    """What ``--power`` says: a number, or a norm of each stream and its number.

    Raises:
        InputError: it is neither.
    """
    if text is None:
        return None
    try:
        if "=" not in text:
            found = {"": int(text)}
        else:
            rows = (row.rpartition("=") for row in text.split(","))
            found = {name.strip(): int(number) for name, _, number in rows}
    except ValueError:
        raise InputError(f"--power {text}: expected a whole number, or NORM=NUMBER with commas between") from None
    if "=" in text and len(found) < len(text.split(",")):
        raise InputError(f"--power {text}: names a norm twice")
    if any(abs(power) > MOST_POWER for power in found.values()):
        raise InputError(
            f"--power {text}: expected numbers from -{MOST_POWER} to {MOST_POWER}, since norms square them"
        )
    return found[""] if "=" not in text else found


def _drawn_from(seed: int) -> None:
    if seed >= SEEDS:
        raise InputError(f"seed is {seed}; expected less than 2^64")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a conversion is allowed to do. An option that a method does not know has no effect there."""

    tied: str | None = option(
        None,
        "An embedding that is also the output head: centre its output, or untie it; center, for crmsnorm untie.",
        choices=("center", "untie"), methods=("rmsnorm", "crmsnorm"), recorded=True, recipe=True, panel=PLANNED,
    )  # fmt: skip
    min_gain: int | None = option(
        None,
        "Insert an operation only where it wins at least N norms; 3, for crmsnorm 2.",
        metavar="N", at_least=1, methods=("rmsnorm", "crmsnorm"), recorded=True, recipe=True, panel=PLANNED,
    )  # fmt: skip
    allow_shifted_outputs: bool = option(
        False,
        "Returned hidden states may change: their mean by token; in rotate their basis, in scale their size.",
        methods=("rmsnorm", "rotate", "scale"), recorded=True, recipe=True, panel=PLANNED,
    )  # fmt: skip
    keep_features: bool = option(
        False,
        "Keep the mean of features, intermediate layers and hidden states; norms behind them stay.",
        methods=("rmsnorm", "crmsnorm", "rotate", "scale"), recorded=True, recipe=True, panel=PLANNED,
    )  # fmt: skip
    allow_unread: bool = option(
        False,
        "Take tensors that no traced call reads for unused: right as long as the model does not use them.",
        methods=("rmsnorm", "crmsnorm", "rotate", "scale"), recorded=True, recipe=True, panel=PLANNED,
    )  # fmt: skip
    through_features: bool = option(
        False,
        "Let scales move across points where features are returned, which changes those.",
        methods=("fuse-bn",), recorded=True, recipe=True, panel=PLANNED,
    )  # fmt: skip
    fold: bool = option(
        False,
        "Move the norms' weight and bias into the linear maps that read them, where each can take them.",
        spelling="--fold/--no-fold", methods=("rmsnorm",), recorded=True, recipe=True, panel=PLANNED,
    )  # fmt: skip
    native: bool = option(
        False,
        "Write the library's own model that has RMSNorm, to be loaded without any code of ours, or refuse.",
        methods=("rmsnorm",), recorded=True, recipe=True, panel=PLANNED,
    )  # fmt: skip
    merge_branches: bool = option(
        False,
        "Make parallel convolutions and skips of a block one convolution.",
        methods=("fuse-bn",), recorded=True, recipe=True, panel=PLANNED,
    )  # fmt: skip
    basis: str = option(
        "isometric",
        "Store d - 1 numbers in an orthogonal basis, or as the paper: drop the last channel.",
        choices=("isometric", "paper"), methods=("crmsnorm",), recorded=True, recipe=True, panel=PLANNED,
    )  # fmt: skip
    keep: str | None = option(
        None,
        "Tensors and modules that may not change: names or patterns, with commas between; norms that need them stay.",
        metavar="NAMES", methods=("fold",), recorded=True, recipe=True, panel=PLANNED,
    )  # fmt: skip
    rotation: str = option(
        "hadamard",
        "hadamard, a Hadamard matrix with random signs; random, a random orthogonal matrix; or a file that holds one.",
        metavar="hadamard|random|FILE", methods=("rotate",), recorded=True, recipe=True, panel=PLANNED,
    )  # fmt: skip
    seed: int = option(
        0,
        "Of the rotation: of its signs, or of the random matrix.",
        metavar="N", at_least=0, valid=_drawn_from, methods=("rotate",), recorded=True, recipe=True, panel=PLANNED,
    )  # fmt: skip
    values: bool = option(
        False,
        "Rotate the values of attention, too, head by head, between the linear maps that write and read them.",
        methods=("rotate",), recorded=True, recipe=True, panel=PLANNED,
    )  # fmt: skip
    power: str | None = option(
        None,
        "Multiply the streams by 2^-N; or NORM=N, a norm of each stream, with commas between; else as measured.",
        metavar="N", valid=powers_in, methods=("scale",), recorded=True, recipe=True, panel=PLANNED,
    )  # fmt: skip
    headroom: float = option(
        4.0,
        "How many times the largest value of a stream has to fit into float16, where its power is measured.",
        metavar="X", at_least=1, methods=("scale",), recipe=True, panel=PLANNED,
    )  # fmt: skip
    data: str | None = option(
        None, "Measure on these examples, too, KIND:WHERE as for swap: text:FILE, imagefolder:DIR, npz:FILE.",
        metavar="KIND:WHERE", methods=("scale",), recipe=True, panel=PLANNED,
    )  # fmt: skip

    def for_method(self, method: str) -> Options:
        """The same, with the method's own defaults for what the user left open."""
        # The library's own model has no operation at a table's output.
        general: dict[str, Any] = {
            "tied": "untie" if self.native else "center",
            "min_gain": 3,
            **DEFAULTS.get(method, {}),
        }
        return replace(self, **{name: value for name, value in general.items() if getattr(self, name) is None})

    def check(self) -> None:
        """Raise InputError if one of them has a value that it cannot have."""
        check_options(self)
        self.check_measuring()
        if self.rotation not in ROTATIONS and "." not in self.rotation:  # files have an ending
            raise InputError(f"unknown rotation {self.rotation!r}; expected {', '.join(ROTATIONS)} or a file")

    def check_measuring(self) -> None:
        """Raise InputError if a power is given, and with it how to measure one."""
        for name in ("data", "headroom"):
            if self.power is not None and getattr(self, name) != getattr(Options, name):
                raise InputError(
                    f"--{name} says how to measure the power, and --power leaves nothing to measure: "
                    "leave one of them out"
                )


@dataclass(frozen=True, kw_only=True)
class Opening:
    """How a source is opened: options of every command that reads one."""

    revision: str | None = option(None, REVISION, metavar="REV", recorded=True, panel=SOURCE)
    arch: str | None = option(
        None,
        "Architecture of bare weights, or FILE.py:FACTORY, which makes it; else found by their names and shapes.",
        metavar="timm:NAME", recorded=True, panel=SOURCE,
    )  # fmt: skip
    variant: str | None = option(
        None,
        "Weights of this name, such as fp16; else those without one, or the only ones.",
        metavar="NAME", recorded=True, panel=SOURCE,
    )  # fmt: skip
    weights: str | None = option(
        None,
        "Of a checkpoint of training: the averaged or the trained weights; else the averaged.",
        choices=tuple(SETS), recorded=True, panel=SOURCE,
    )  # fmt: skip
    trust_remote_code: bool = option(False, TRUST, recipe=True, panel=SOURCE)

    @property
    def opening(self) -> dict[str, Any]:
        """The arguments of :func:`normconvert.sources.open_source`."""
        return {one.name: getattr(self, one.name) for one in fields(Opening)}

    @property
    def how(self) -> Opening:
        """These options alone, without those of the request that they are part of."""
        return Opening(**self.opening)


@dataclass(frozen=True, kw_only=True)
class _Planning(Opening, Options):
    """What it takes to plan a conversion."""

    @property
    def allowed(self) -> Options:
        """What the conversion is allowed to do."""
        return Options(**{one.name: getattr(self, one.name) for one in fields(Options)})


@dataclass(frozen=True)
class Identifying:
    """What :func:`normconvert.identify` is asked."""

    path: str | Path = option(
        MISSING, "A weight file (safetensors or a pickle), a folder, or a hub id.", metavar="CKPT"
    )
    _: KW_ONLY
    revision: str | None = option(None, REVISION, metavar="REV", panel=SOURCE)


@dataclass(frozen=True)
class Inspection(_Planning):
    """What :func:`normconvert.inspect` is asked; ``stage`` is told of each stage as it begins."""

    src: str | Path | Network = option(MISSING, SRC, metavar="SRC", model=True)
    method: str = option(
        "rmsnorm", f"The conversion to look at: {METHOD}.", formerly=("--for",), metavar="METHOD",
        choices=tuple(METHODS),
    )  # fmt: skip
    _: KW_ONLY
    example_inputs: Any = option(None, EXAMPLE, console=False)
    anatomy: str | Path | None = option(
        None,
        "Write what reads each norm, what writes into each stream and what is paired, as JSON; - for stdout.",
        metavar="FILE",
    )
    form: str = option(
        "graph", "Of the anatomy: all of it, or as quantisers map layers.", spelling="--format", choices=FORMS
    )
    stage: Stage | None = None


@dataclass(frozen=True)
class Conversion(_Planning):
    """What :func:`normconvert.convert` is asked.

    Attributes:
        progress: called with (tensor, bytes done, bytes in all) while writing.
        stage: called with each stage's name as it begins.
    """

    src: str | Path = option(MISSING, SRC, metavar="SRC")
    out: Path | str = option(MISSING, OUT, metavar="OUT")
    method: str = option("rmsnorm", f"The conversion: {METHOD}.", metavar="METHOD", choices=tuple(METHODS))
    _: KW_ONLY
    dtype: str = option(
        "auto",
        "Store the weights in this dtype; auto keeps each tensor's own.",
        choices=DTYPES, aliases=SHORT_DTYPES, recorded=True, recipe=True, panel=WRITTEN,
    )  # fmt: skip
    max_shard_size: int | None = option(
        None, "Size of a weight file, such as 5GB or 500MB; else as the source.",
        metavar="SIZE", parse=parse_size, recorded=True, recipe=True, panel=WRITTEN,
    )  # fmt: skip
    require_all: bool = option(False, "Refuse unless every norm can be converted.", recipe=True, panel=PLANNED)
    stream: bool = option(
        False, "Fetch, convert and delete the shards on the hub one by one; goes on if stopped.", panel=WRITTEN
    )
    overwrite: bool = option(False, OVERWRITE, panel=WRITTEN)
    dry_run: bool = option(False, "Plan only; write nothing.", panel=WRITTEN)
    push_to_hub: str | None = option(
        None, "Upload OUT to this repository, a private one if it has to be made.", metavar="REPO", panel=WRITTEN
    )
    public: bool = option(False, "With --push-to-hub: a public one.", panel=WRITTEN)
    name: str | None = option(
        None, "What the model card's examples load; else that repository, or OUT's name.", recorded=True, console=False
    )
    verify: bool = option(
        True, "Check the result before it appears.", off="Do not check the result.", recipe=True, panel=CHECKED
    )
    verify_level: str = option("standard", LEVEL, spelling="--verify", choices=LEVELS, panel=CHECKED)
    device: str = option(
        "cpu", "Where the verification runs: cpu, cuda, cuda:1, mps.", metavar="DEVICE", recipe=True, panel=CHECKED
    )
    limits: Mapping[str, float] | None = option(
        None, "Figure of the verification and its limit, narrower than what every conversion is held to.", console=False
    )
    progress: Callable[[str, int, int], None] | None = None
    stage: Stage | None = None


def check_device(device: str) -> None:
    """Refuse a device that is not there, before any work is done.

    Raises:
        InputError: torch does not know it, or cannot use it here.
    """
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = first_line(error)
        raise InputError(f"device {device!r} cannot be used here: {reason}") from error
