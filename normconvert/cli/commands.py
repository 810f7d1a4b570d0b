"""A request's options as the options of a command: what typer reads from a signature is made from the request.

    @app.command()
    @command(Conversion, View, method="rmsnorm")
    def rmsnorm(ask: Ask[Conversion], view: View) -> int: ...

``ask()`` makes the request. It is called where errors are shown, since a size may be no size.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, replace
from enum import Enum
from types import UnionType
from typing import Annotated, Any, Protocol, TypeVar, Union, get_args, get_origin

import typer

from normconvert.options import About, about, types

Request = TypeVar("Request")
Asked = TypeVar("Asked", covariant=True)
Shown = TypeVar("Shown")


class Ask(Protocol[Asked]):
    """Makes the request of what was typed; keyword arguments win over that."""

    def __call__(self, **others: Any) -> Asked:
        """The request.

        Raises:
            InputError: something typed cannot be read.
        """


def command(
    request: type[Request], view: type[Shown], optional: Mapping[str, str] | None = None, **fixed: Any
) -> Callable[[Callable[[Ask[Request], Shown], int]], Callable[..., int]]:
    """Turn a function of a request and a view into one that typer can register.

    Args:
        request: its options become the command's, but those that have no effect on the method in ``fixed``.
        view: how the result is shown; its options follow those of the request.
        optional: arguments that this command makes up if they are left out, with the help that says how.
        fixed: options that the command itself gives.
    """

    def decorate(function: Callable[[Ask[Request], Shown], int]) -> Callable[..., int]:
        parameters = {
            request: list(_parameters(request, fixed, optional or {})),
            view: list(_parameters(view, {}, {})),
        }

        @functools.wraps(function)
        def run(**typed: Any) -> int:
            def ask(**others: Any) -> Request:
                return request(**{**fixed, **_values(request, typed), **others})

            return function(ask, view(**_values(view, typed)))

        signature = inspect.Signature([parameter for some in parameters.values() for parameter in some])
        run.__signature__ = signature  # type: ignore[attr-defined]
        # typer resolves annotations by name, and these are objects already
        run.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
        return run

    return decorate


def _parameters(kind: type[Any], fixed: Mapping[str, Any], optional: Mapping[str, str]) -> Iterator[inspect.Parameter]:
    hints, method = types(kind), fixed.get("method")
    for name, default, known in sorted(about(kind), key=lambda row: not row[2].leads):
        if name in fixed or not known.console or (method and known.methods and method not in known.methods):
            continue
        if name in optional:
            default, known = None, replace(known, help=optional[name], metavar=f"[{known.metavar}]", positional=True)
            hints[name] = hints[name] | None
        yield inspect.Parameter(
            _typed_name(name, known),
            inspect.Parameter.KEYWORD_ONLY,
            default=_typed_default(default, known),
            annotation=Annotated[_typed_as(hints[name], known), _typer_info(name, default, known)],
        )


def _typed_name(name: str, known: About) -> str:
    """The name of typer's parameter: ``no_verify`` for an option that switches ``verify`` off."""
    return f"no_{name}" if known.off else name


def _typed_default(default: Any, known: About) -> Any:
    if known.leads or known.required or default is MISSING:
        return inspect.Parameter.empty
    if known.off:
        return not default
    if default == ():
        return None
    return _choice(known)(default) if known.choices and default is not None else default


@functools.cache
def _enum(choices: tuple[str, ...]) -> type[Enum]:
    return Enum("Choice", {choice.upper(): choice for choice in choices}, type=str)  # type: ignore[return-value]


def _choice(known: About) -> type[Enum]:
    return _enum(known.choices)


def _typed_as(hint: Any, known: About) -> Any:
    """What typer parses an option as: choices as an enumeration, as text what the option itself parses."""
    optional = type(None) in get_args(hint)
    kind = hint
    if known.choices:
        kind = _choice(known)
    elif get_origin(hint) is Sequence:  # any number of them
        return list[get_args(hint)[0]] | None  # type: ignore[misc]
    elif known.parse is not None:
        kind = str
    elif isinstance(hint, UnionType) or get_origin(hint) is Union:
        kind = get_args(hint)[0]  # of "str | Path", the first is what typer is to make
    return kind | None if optional else kind


def _typer_info(name: str, default: Any, known: About) -> Any:
    if known.positional or known.leads or (default is MISSING and not known.required):
        return typer.Argument(metavar=known.metavar, help=known.help, **known.details)
    names = [*([f"-{known.short}"] if known.short else []), _spelled(name, known)]
    return typer.Option(*names, metavar=known.metavar, help=known.off or known.help, **known.details)


def _spelled(name: str, known: About) -> str:
    return known.spelling or f"--{_typed_name(name, known).replace('_', '-')}"


def _values(kind: type[Any], typed: dict[str, Any]) -> dict[str, Any]:
    """The fields of a request from what typer parsed."""
    found: dict[str, Any] = {}
    for name, default, known in about(kind):
        key = _typed_name(name, known)
        if key not in typed:
            continue
        value = typed[key]
        if isinstance(value, Enum):
            value = value.value
        if isinstance(value, list) or (value is None and default == ()):
            value = tuple(value or ())
        if known.off:
            value = not value
        if known.parse is not None and value is not None:
            value = known.parse(value, _spelled(name, known))
        found[name] = value
    return found
