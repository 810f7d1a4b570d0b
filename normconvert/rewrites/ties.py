"""Tied tables: what a config can part of what a class ties, and what else of the model it changes by that.

A key of the config says that the head is a tensor of its own. Classes may let it say more (another key that goes by
it, a number that the last value is multiplied by), and may tie whatever it says: two tensors that differ are two there
because a checkpoint holds both. So the config is asked what it makes of the key, and the traced model what that does.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import fx, nn

from normconvert.plan.conversion_plan import Plan, edited_config
from normconvert.sources.transformers_models import TIE
from normconvert.tracing.graph import Graph, module_path
from normconvert.tracing.in_place_writes import MARKER, unmarked
from normconvert.tracing.operations import EMBEDDING, name_of, readers
from normconvert.tracing.probes import quiet


def untied_config(model: nn.Module) -> dict[str, Any]:
    """The keys of a config which say that the head is a tensor of its own: key -> value.

    Beside :data:`TIE` those switches that the config's class sets by it. A config.json may hold them, and what it holds
    goes before what they are set to.
    """
    config: Any = getattr(model, "config", None)
    found: dict[str, Any] = {TIE: False}
    if not _is_config(config):
        return found
    try:
        with quiet():
            tied, untied = (type(config)(**{TIE: value}).to_dict() for value in (True, False))
    except Exception:  # a config that cannot be made without more
        return found
    switches = {key: value for key, value in untied.items() if type(value) is bool and tied.get(key) is (not value)}
    return found | {key: value for key, value in switches.items() if hasattr(config, key) and key != TIE}


def switches(plan: Plan) -> dict[str, Any]:
    """The numbers and switches that a plan sets in the config: what a model may read of it while it runs."""
    return {key: value for key, value in plan.config.items() if type(value) in (float, bool)}


def as_taken(model: nn.Module, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The values that the keys of a config have once the model is loaded with ``changes`` in its config.json.

    A class may set what it likes: keys by others, and the one that ties to true for good.
    """
    config: Any = getattr(model, "config", None)
    if TIE not in changes or not _is_config(config):
        return dict(changes)
    try:
        with quiet():
            loaded = type(config).from_dict(edited_config(config.to_dict(), changes))
    except Exception:  # a config that its own data does not make again is read as it stands
        return dict(changes)
    return {key: functools.reduce(getattr, key.split("."), loaded) for key in changes}


def set_as_taken(model: nn.Module, changes: Mapping[str, Any]) -> None:
    """Give a model's config the values of :func:`as_taken`; settings of other libraries know no such keys."""
    for key, value in as_taken(model, changes).items():
        *parents, last = key.split(".")
        node: Any = getattr(model, "config", None)
        for parent in parents:
            node = getattr(node, parent, None)
        if hasattr(node, last):
            setattr(node, last, value)


def ties_for_good(model: nn.Module) -> bool:
    """Whether the class ties a head to its table whatever the config says, if a checkpoint does not hold both."""
    return _is_config(getattr(model, "config", None)) and as_taken(model, {TIE: False})[TIE] is not False


def stay_tied(model: nn.Module, names: Collection[str]) -> bool:
    """Whether these names are one tensor still where the config says that the head is another."""
    owners = {id(model.get_submodule(name.rpartition(".")[0])) for name in names}
    return len(owners) == 1 or not _is_config(getattr(model, "config", None)) or ties_for_good(model)


def table_and_head(graph: Graph, tied: fx.Node) -> tuple[str, str]:
    """A name of a tied table as the embedding, and the one that it has as the output head."""
    head = next(f"{module_path(user)}.weight" for user in readers(tied) if name_of(user) != EMBEDDING)
    return next(name for name in graph.parameters[tied].aliases if name != head), head


def scaled_heads(graph: Graph) -> dict[str, tuple[float, list[fx.Node]]]:
    """Heads by a tied table which at every call read a value times one number, and nobody else does.

    Returns:
        Name of the head -> the number, and the products.
    """
    found: dict[str, tuple[float, list[fx.Node]]] = {}
    for node, parameter in graph.parameters.items():
        heads = [user for user in readers(node) if name_of(user) != EMBEDDING]
        names = {f"{module_path(user)}.weight" for user in heads}
        if len(parameter.aliases) < 2 or len(names) != 1 or any(name_of(user) != "aten.linear" for user in heads):
            continue
        products: list[Any] = list(dict.fromkeys(unmarked(user.args[0]) for user in heads))
        numbers = {_number_of(product) for product in products}
        alone = all(user in heads for product in products for user in _seen_by(graph, product))
        if alone and len(numbers) == 1 and (number := numbers.pop()) is not None:
            found[names.pop()] = number, products
    return found


def _number_of(product: fx.Node) -> float | None:
    args = product.args
    plain = name_of(product) == "aten.mul" and len(args) == 2 and not product.kwargs and isinstance(args[0], fx.Node)
    return args[1] if plain and isinstance(args[1], float) else None


def _seen_by(graph: Graph, value: fx.Node) -> Iterator[fx.Node | None]:
    """Who reads a value, marked or not; None for whoever the model returns it to."""
    if value in graph.outputs or value in graph.exits:
        yield None
    for user in value.users:
        if user.target is MARKER:
            yield from _seen_by(graph, user)
        else:
            yield None if user.op == "output" else user


def _is_config(config: Any) -> bool:
    return hasattr(config, "to_dict") and hasattr(type(config), "from_dict")
