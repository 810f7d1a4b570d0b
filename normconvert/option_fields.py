"""An option, and what is made of it: a field of a request says all that there is to know of it, once.

:func:`taking` makes the keyword arguments of the Python API of a request's fields; the command line
(`normconvert.cli.commands`), the schema of recipes and the record are made of :func:`about` alike.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ParamSpec, TypeVar, get_type_hints

from normconvert.errors import InputError

P = ParamSpec("P")
Request = TypeVar("Request")
Result = TypeVar("Result")


@dataclass(frozen=True)
class About:
    """What there is to know of an option beside its name, type and default.

    Attributes:
        help: one or two sentences, the same wherever the option is described.
        metavar: what stands for its value in help texts.
        choices: what it may be; empty: anything of its type.
        aliases: further spellings of choices -> the choice.
        panel: the heading that it stands under in help texts; empty: that of options without one.
        formerly: older spellings on the command line, which stay.
        at_least: the smallest number that it may be.
        methods: the conversions that it has an effect on; empty: all.
        spelling: its name on the command line, where that is not its own.
        off: what ``--no-NAME`` does, for an option that the command line only switches off.
        short: its letter on the command line.
        parse: (what is typed, the option as it is spelled) -> the value.
        valid: refuses, by an InputError, a value that it cannot have.
        recorded: part of what the output depends on, and so of its record.
        recipe: a recipe may set it.
        console: the command line has it.
        positional: an argument there, even though it has a default.
        required: must be given there, by its name.
        model: it may be a model in memory.
        details: further arguments of typer's option.
    """

    help: str
    metavar: str | None = None
    choices: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    panel: str = ""
    formerly: tuple[str, ...] = ()
    at_least: int | None = None
    methods: tuple[str, ...] = ()
    spelling: str | None = None
    off: str | None = None
    short: str | None = None
    parse: Callable[[str, str], Any] | None = None
    valid: Callable[[Any], object] | None = None
    recorded: bool = False
    recipe: bool = False
    console: bool = True
    positional: bool = False
    required: bool = False
    model: bool = False
    details: Mapping[str, Any] = field(default_factory=dict)

    def settled(self, value: Any) -> Any:
        """A value, or the choice that it is another spelling of."""
        return self.aliases.get(value, value) if isinstance(value, str) else value


def option(default: Any, help: str, **about: Any) -> Any:
    """A field that is an option; ``default`` may be ``MISSING``. Further arguments are those of :class:`About`."""
    return field(default=default, metadata={"about": About(help, **about)})


def about(kind: type[Any]) -> Iterator[tuple[str, Any, About]]:
    """The options of a request, in order: name, default (``MISSING`` if it must be given), what there is to know."""
    for one in fields(kind):
        if "about" in one.metadata:
            yield one.name, one.default, one.metadata["about"]


def types(request: type[Any]) -> dict[str, Any]:
    """Option -> its type."""
    # The mark between a request's arguments is no type, which Python 3.10 insists on.
    return get_type_hints(request, localns={"KW_ONLY": type(None)})


def recorded(request: Any) -> dict[str, Any]:
    """The options of a request that its output depends on, for the record."""
    return {name: getattr(request, name) for name, _, known in about(type(request)) if known.recorded}


def check_options(request: Any) -> None:
    """Raise InputError if an option of ``request`` has a value that it cannot have."""
    for name, default, known in about(type(request)):
        value = getattr(request, name)
        if value is None and default is None:
            continue
        if known.choices and value not in known.choices:
            expected = " or ".join(known.choices) if len(known.choices) < 3 else f"one of {', '.join(known.choices)}"
            raise InputError(f"unknown {name} {value!r}; expected {expected}")
        if known.at_least is not None and not math.isfinite(value):
            raise InputError(f"{name} is {value}; expected a finite number")
        if known.at_least is not None and value < known.at_least:
            raise InputError(f"{name} is {value}; expected {known.at_least} or more")
        if known.valid is not None:
            known.valid(value)


def taking(kind: Callable[P, Request]) -> Callable[[Callable[[Request], Result]], Callable[P, Result]]:
    """Let a function of a request be called with the request's fields as its arguments, typed and documented.

    The docstring gains a line for each option, before its sections ``Returns:`` and ``Raises:``.
    """

    def decorate(function: Callable[[Request], Result]) -> Callable[P, Result]:
        signature = inspect.signature(kind)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> Result:
            _refuse_models(function.__name__, kind, args, kwargs)
            try:
                signature.bind(*args, **kwargs)
            except TypeError as error:  # told as of this function, not of the request
                raise TypeError(f"{function.__name__}() {error}") from None
            return function(_settled(kind(*args, **kwargs)))

        call.__signature__ = signature.replace(return_annotation=inspect.signature(function).return_annotation)  # type: ignore[attr-defined]
        call.__doc__ = _documented(function.__doc__ or "", kind)
        return call

    return decorate


def is_model(value: object) -> bool:
    """Whether a value is a model in memory; torch is not imported to find out."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.nn.Module)


def _refuse_models(name: str, kind: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
    """Refuse a model where a checkpoint is asked for."""
    given = [*zip(inspect.signature(kind).parameters, args, strict=False), *kwargs.items()]
    takes = {option for option, _, known in about(kind) if known.model}
    if any(is_model(value) and option not in takes for option, value in given):
        raise InputError(
            f"{name}() reads a checkpoint, and was given a model in memory: normconvert.convert_model, inspect and "
            "verify take those"
        )


def _settled(request: Request) -> Request:
    """The request with each choice under its own name, and numbers and lists as the text that an option takes.

    Raises:
        InputError: an option has a value of another type.
    """
    found, hints = {}, types(type(request))
    for name, _, known in about(type(request)):
        value = given = getattr(request, name)
        if hints[name] in (str, str | None):
            if isinstance(value, int) and not isinstance(value, bool):
                value = str(value)
            elif isinstance(value, (list, tuple)) and all(isinstance(one, str) for one in value):
                value = ",".join(value)
        value = known.settled(value)
        expected = _PLAIN.get(hints[name])
        if expected and not (isinstance(value, expected[0]) and (expected[0] is bool or not isinstance(value, bool))):
            raise InputError(f"{name} is {value!r}; expected {expected[1]}")
        if value is not given:
            found[name] = value
    return replace(request, **found) if found else request  # type: ignore[type-var]


_PLAIN: Mapping[Any, tuple[Any, str]] = {
    int: (int, "a whole number"), float: ((int, float), "a number"), bool: (bool, "True or False"),
    int | None: ((int, type(None)), "a whole number, or None"), str | None: ((str, type(None)), "text, or None"),
}  # fmt: skip
"""Type of an option -> what it may be, and that in words; of the others, models and paths say, their readers tell."""


def _documented(doc: str, kind: Any) -> str:
    known = {name: one.help for name, _, one in about(kind)}
    rows = [f"        {name}: {known[name]}" for name in inspect.signature(kind).parameters if name in known]
    head, section, rest = re.match(r"(.*?)(\n    (?:Returns|Raises):|\Z)(.*)", doc, re.DOTALL).groups()  # type: ignore[union-attr]
    return "\n".join([f"{head.rstrip()}\n\n    Args:", *rows, ""]) + f"{section}{rest}"


def parse_size(text: str, what: str = "--max-shard-size") -> int:
    """Bytes from ``5GB``, ``500MB``, ``2GiB`` or a plain number, as huggingface reads them (GB is 10⁹, GiB 2³⁰).

    Args:
        text: what was written.
        what: where, for the error.

    Raises:
        InputError: it is none of these.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT])(I?)B?|B)?\s*", text.upper())
    size = 0
    if match and len(text) < 40:
        number, letter, binary = match.groups()
        size = int(float(number) * (1024 if binary else 1000) ** ("KMGT".index(letter) + 1 if letter else 0))
    if not 1 <= size < 1 << 60:
        raise InputError(f"{what} {text}: expected a size such as 5GB, 500MB or 2GiB")
    return size
