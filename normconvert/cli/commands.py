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
from types import UnionType
from typing import Annotated, Any, Protocol, TypeVar, Union, get_args, get_origin

import typer

from normconvert.option_fields import About, about, types

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
    request: type[Request],
    view: type[Shown],
    optional: Mapping[str, str] | None = None,
    said: Mapping[str, str] | None = None,
    **fixed: Any,
) -> Callable[[Callable[[Ask[Request], Shown], int]], Callable[..., int]]:
    """Turn a function of a request and a view into one that typer can register.

    Args:
        request: its options become the command's, but those that have no effect on the method in ``fixed``.
        view: how the result is shown; its options follow those of the request.
        optional: arguments that this command makes up if they are left out, with the help that says how.
        said: options whose help is another one here.
        fixed: options that the command itself gives.
    """

    def decorate(function: Callable[[Ask[Request], Shown], int]) -> Callable[..., int]:
        parameters = {
            request: list(_parameters(request, fixed, optional or {}, said or {})),
            view: list(_parameters(view, {}, {}, said or {})),
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


def _parameters(
    kind: type[Any], fixed: Mapping[str, Any], optional: Mapping[str, str], said: Mapping[str, str]
) -> Iterator[inspect.Parameter]:
    hints, method = types(kind), fixed.get("method")
    for name, default, known in about(kind):
        if name in fixed or not known.console or (method and known.methods and method not in known.methods):
            continue
        known = replace(known, help=said.get(name, known.help))
        if known.methods and not method:
            known = replace(known, help=f"{known.help}  [{', '.join(known.methods)}]")
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
    if known.required or default is MISSING:
        return inspect.Parameter.empty
    if known.off:
        return not default
    return None if default == () else default


def _typed_as(hint: Any, known: About) -> Any:
    """What typer parses an option as: as text choices and what the option itself parses."""
    optional = type(None) in get_args(hint)
    kind = hint
    if get_origin(hint) is Sequence and known.parse is None:  # any number of them
        return list[get_args(hint)[0]] | None  # type: ignore[misc]
    if known.choices or known.parse is not None:
        kind = str
    elif isinstance(hint, UnionType) or get_origin(hint) is Union:
        kind = get_args(hint)[0]  # of "str | Path", the first is what typer is to make
    return kind | None if optional else kind


def _typer_info(name: str, default: Any, known: About) -> Any:
    if known.positional or (default is MISSING and not known.required):
        return typer.Argument(metavar=known.metavar, help=known.help, **_choosing(known), **known.details)
    names = [*([f"-{known.short}"] if known.short else []), spelled(name, known), *known.formerly]
    more: dict[str, Any] = {**_choosing(known), **known.details}
    return typer.Option(
        *names, metavar=known.metavar or "|".join(known.choices) or None, help=known.off or known.help,
        rich_help_panel=known.panel or None, **more,
    )  # fmt: skip


def _choosing(known: About) -> dict[str, Any]:
    """What has typer take one of an option's choices, under any of its spellings, and shells complete it."""
    if not known.choices:
        return {}

    def parser(typed: str) -> str:
        value: str = known.settled(typed)
        if value not in known.choices:
            raise typer.BadParameter(f"{typed!r} is not one of {', '.join(map(repr, known.choices))}.")
        return value

    def autocompletion(incomplete: str) -> list[str]:
        return [choice for choice in (*known.choices, *known.aliases) if choice.startswith(incomplete)]

    return {"parser": parser, "autocompletion": autocompletion}


def spelled(name: str, known: About) -> str:
    """How an option is written on the command line."""
    return known.spelling or f"--{_typed_name(name, known).replace('_', '-')}"


def _values(kind: type[Any], typed: dict[str, Any]) -> dict[str, Any]:
    """The fields of a request from what typer parsed."""
    found: dict[str, Any] = {}
    for name, default, known in about(kind):
        key = _typed_name(name, known)
        if key not in typed:
            continue
        value = typed[key]
        if isinstance(value, list) or (value is None and default == ()):
            value = tuple(value or ())
        if known.off:
            value = not value
        if known.parse is not None and value is not None:
            value = known.parse(value, spelled(name, known))
        found[name] = value
    return found
