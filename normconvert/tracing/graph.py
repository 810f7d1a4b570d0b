"""Model -> Graph: torch.export on the meta device, with module boundaries marked in the graph.

No weight is read and no kernel runs. Two things are added to what ``torch.export`` gives:

- *boundary markers*: identity operations at the inputs and outputs of modules, so that a place where a centring
  operation may be put later ("the output of ``transformer.wte``") is an ordinary node of the graph;
- *flattening*: regions such as no_grad, which export keeps as sub-graphs, are inlined, and in-place
  operations are made functional, so that the analysis sees one list of pure operations.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from normconvert.compat.lean_export import lean_export
from normconvert.compat.torch import FakeTensor, pytree, without_printed_graphs
from normconvert.errors import TraceError, first_line
from normconvert.runtime import one_at_a_time
from normconvert.tracing.boundary_markers import marked
from normconvert.tracing.calls import without_values
from normconvert.tracing.constant_buffers import constant_buffers, in_place, without_changed
from normconvert.tracing.entries import entered, is_whole
from normconvert.tracing.exits import exits_in, with_tensors
from normconvert.tracing.garbage import collecting
from normconvert.tracing.in_place_writes import boundary_of, make_functional, markers_that_lie, without_detaching
from normconvert.tracing.inlined_regions import inline_regions
from normconvert.tracing.known_values import UNKNOWN_VALUE, known_values
from normconvert.tracing.live_values import read_tensors
from normconvert.tracing.model_caches import fresh_caches
from normconvert.tracing.output_paths import named_values
from normconvert.tracing.own_hooks import refuse_unseen, watched_values
from normconvert.tracing.pretend_cpu import on_either_device, pretending


@dataclass(frozen=True)
class Parameter:
    """A tensor of the model that the graph reads.

    Attributes:
        name: its name in ``state_dict`` (the first one, if several names share the tensor).
        aliases: all its names.
        stored: whether a checkpoint holds it; False for non-persistent buffers and constants made while tracing.
        value: of a constant made while tracing; one NaN where it is not known.
    """

    name: str
    aliases: tuple[str, ...]
    stored: bool
    value: Tensor | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Graph:
    """A traced model.

    Attributes:
        nodes: operations in execution order (ATen, functional, on meta tensors).
        parameters: placeholder node -> the tensor it stands for.
        outputs: node -> names of the model outputs it is.
        modules: module path -> module on the meta device.
        unreached: name -> shape of the parameters and floating buffers that the traced calls do not read.
        calls: the traced calls, keyword inputs and the path of the module that was called, or a method's name.
        unmarked: modules without markers in one of the calls, where a hook would act unseen.
        outside: placeholders of embeddings that a further call is given in place of what they are made of.
        doors: arguments and methods that such a call was traced for.
        untraced_doors: those for which none could be.
        exits: value -> the ways out of the model, other than its outputs, that return it.
        kept: attributes and tables of modules where a call leaves tensors.
        unread_is_unused: the user says that no call reads what none of these does.
    """

    nodes: tuple[fx.Node, ...]
    parameters: Mapping[fx.Node, Parameter]
    outputs: Mapping[fx.Node, tuple[str, ...]]
    modules: Mapping[str, nn.Module]
    unreached: Mapping[str, tuple[int, ...]]
    calls: tuple[tuple[Mapping[str, Any], str], ...] = ()
    unmarked: frozenset[str] = frozenset()
    outside: frozenset[fx.Node] = frozenset()
    doors: tuple[str, ...] = ()
    untraced_doors: tuple[str, ...] = ()
    exits: Mapping[fx.Node, tuple[str, ...]] = field(default_factory=dict)
    kept: tuple[str, ...] = ()
    unread_is_unused: bool = False

    @functools.cached_property
    def ways_out(self) -> frozenset[fx.Node]:
        """The values that the model returns, as its outputs or otherwise."""
        return frozenset(self.exits) | frozenset(self.outputs)

    @functools.cached_property
    def tensors(self) -> dict[str, fx.Node]:
        """Each name of a tensor -> its placeholder; a tied one has several, of which one is used: that."""
        ordered = sorted(self.parameters.items(), key=lambda item: bool(item[0].users))
        return {name: node for node, parameter in ordered for name in parameter.aliases}


@one_at_a_time
def trace(model: nn.Module, inputs: Mapping[str, Any], entry: str = "") -> Graph:
    """Trace ``model`` (on the meta device, eval mode) with keyword ``inputs``.

    Args:
        model: gives the names of parameters and modules.
        inputs: keyword arguments of the forward that is traced; tensors on the meta device, or on the CPU, whose values
            are known where the model asks for them (see :mod:`known_values`).
        entry: what to call instead of the whole (see :mod:`normconvert.tracing.entries`); the results of a method of
            features are ways out, not outputs.

    Raises:
        TraceError: torch.export cannot trace the model; the message names the operation and the line that stopped it.
    """
    model.eval()
    try:
        with torch.no_grad(), warnings.catch_warnings(), without_printed_graphs():
            warnings.simplefilter("ignore")
            program, unmarked, kept = on_either_device(lambda *where: _export(model, inputs, entry, *where))
    except Exception as error:  # torch.export raises many kinds; all mean the same to the user
        raise TraceError(_why(error)) from error
    refuse_unseen(model, unmarked)
    module = program.graph_module
    inline_regions(module)
    _name_paths(model, module.graph)
    parameters = _parameters(model, program, module.graph)
    outputs = _outputs(program, module.graph)
    watched = watched_values(module.graph)
    modules = dict(model.named_modules(remove_duplicate=False))
    exits = exits_in(model, tuple(module.graph.nodes)) if is_whole(entry) else {}
    if entry not in modules and not is_whole(entry):
        outputs, exits = {}, dict.fromkeys(outputs, (entry,))
    ways_out = exits.keys() | watched.keys() | outputs.keys()
    # An export has a placeholder for every tensor of the model, read or not.
    read = read_tensors(tuple(module.graph.nodes), ways_out, parameters.keys())
    reached = {name for node in read for name in parameters[node].aliases}
    return Graph(
        nodes=tuple(module.graph.nodes),
        parameters=parameters,
        outputs={**watched, **outputs},
        modules=modules,
        unreached={name: tuple(t.shape) for name, t in _floating_tensors(model) if name not in reached},
        calls=((dict(inputs), entry),),
        unmarked=unmarked,
        exits=exits,
        kept=kept,
    )


def _floating_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters, and the buffers that a model can compute with: counts, indices and masks are none."""
    yield from model.named_parameters(remove_duplicate=False)
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if buffer.is_floating_point() or buffer.is_complex():
            yield name, buffer


def merge(first: Graph, second: Graph) -> Graph:
    """Two calls of one model as one graph: they share the parameters, and nothing else.

    What is proved of it holds for both ways to call the model. ``first`` is taken over; its nodes stay the same.
    """
    graph = first.nodes[0].graph
    mapping: dict[fx.Node, fx.Node] = {}
    parameters, outputs, copies = dict(first.parameters), dict(first.outputs), []
    for node in second.nodes:
        parameter = second.parameters.get(node)
        if parameter is not None and parameter.name in first.tensors:
            mapping[node] = first.tensors[parameter.name]
            continue
        # The second output node as well. No program may have two of them, but this one is read and never run.
        mapping[node] = graph.node_copy(node, mapping.__getitem__)
        copies.append(mapping[node])
        if parameter is not None:
            parameters[mapping[node]] = parameter
        if node in second.outputs:
            names = (*outputs.get(mapping[node], ()), *second.outputs[node])
            outputs[mapping[node]] = tuple(dict.fromkeys(names))
    return Graph(
        nodes=(*first.nodes, *copies),
        parameters=parameters,
        outputs=outputs,
        modules=first.modules,
        unreached={n: s for n, s in first.unreached.items() if n in second.unreached},
        calls=first.calls + second.calls,
        unmarked=first.unmarked | second.unmarked,
        outside=first.outside | {mapping[node] for node in second.outside},
        doors=first.doors + second.doors,
        untraced_doors=first.untraced_doors + second.untraced_doors,
        exits={**first.exits, **{mapping[node]: names for node, names in second.exits.items()}},
        kept=tuple(dict.fromkeys((*first.kept, *second.kept))),
    )


def _export(
    model: nn.Module, inputs: Mapping[str, Any], entry: str, device: str, watch: AbstractContextManager[Any]
) -> tuple[Any, frozenset[str], tuple[str, ...]]:
    """Export with markers, functional in the end; the modules left without markers, and where it left tensors.

    A marker copies, so it would hide a write through one name of a tensor from its other names. Where the program
    writes in place to a tensor after a marker of it, under whatever name, the program is exported again without that
    marker. A buffer that is written to is no constant: then the program is exported again without its values.
    """
    without: set[str] = set()
    held = constant_buffers(model)
    while True:
        hooks = marked(model, without), _entered(model, entry, inputs, held, watch)
        made = fresh_caches(model), pretending(model, device)
        # A graph is cycles that are needed: looking through them took a tenth of a trace.
        with hooks[0], hooks[1], made[0] as left, made[1], lean_export(), collecting(False):
            program = torch.export.export(model, (), without_values(inputs, device), strict=False)
        graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, fx.GraphModule)]
        for graph in graphs:
            without_detaching(graph)
        # A module without markers stays without, so the loop ends.
        written = set().union(*(markers_that_lie(graph) for graph in graphs))
        if written:
            without |= written
            continue
        functional = [make_functional(graph) for graph in graphs]
        if not all(functional):
            # fx asks for this after every change of a graph that is run again, as run_decompositions does.
            for module in program.graph_module.modules():
                if isinstance(module, fx.GraphModule):
                    module.recompile()
            program = program.run_decompositions({})
        kept = without_changed(model, held, program.graph_signature.buffers_to_mutate.values())
        if len(kept) == len(held):
            return program, frozenset(without), tuple(dict.fromkeys(left))
        held = kept


@contextmanager
def _entered(
    model: nn.Module,
    entry: str,
    inputs: Mapping[str, Any],
    constants: Mapping[str, Tensor],
    watch: AbstractContextManager[Any],
) -> Iterator[None]:
    """Have a call of ``model`` run ``entry`` alone, if given, under the names that it has in ``model``.

    The values of ``inputs`` and of constant buffers are known meanwhile; above all modes of ``torch.export``, which
    would ask for them first.
    """
    # The model itself is called in any case, since its parameters are to have the names that they have in it.
    run = entered(model, entry)

    # Export takes the names of the inputs from the signature.
    @functools.wraps(run.forward if isinstance(run, nn.Module) else run)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with watch, known_values(inputs, kwargs, in_place(model, constants)):
            return with_tensors(run(*args, **kwargs))

    # A model may have a forward of its own beside that of its class, as wrappers set it: that is put back.
    own = model.__dict__.get("forward")
    model.__dict__["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del model.__dict__["forward"]
        else:
            model.__dict__["forward"] = own


def module_path(node: fx.Node) -> str:
    """The path of the innermost module that ran ``node``; empty for the model itself."""
    return str(node.meta.get(_PATH, ""))


def home_of(node: fx.Node) -> str:
    """The path of the module that a node belongs to: that ran it or, of a marker, whose boundary it marks."""
    place = boundary_of(node)
    return place[0] if place is not None else module_path(node)


_PATH = "normconvert_path"


def _name_paths(model: nn.Module, graph: fx.Graph) -> None:
    """Note each node's module by one name, although a module that is registered twice has several."""
    first: dict[int, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        first.setdefault(id(module), path)
    names = {path: first[id(module)] for path, module in model.named_modules(remove_duplicate=False)}
    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        # The innermost module comes last.
        path = str(next(reversed(stack.values()))[0]) if stack else ""
        node.meta[_PATH] = names.get(path, path)


def _why(error: BaseException) -> str:
    """One line for a person: the first sentence of the error and the line of model code that raised it."""
    frame, where = error.__traceback__, ""
    while frame is not None:
        code = frame.tb_frame.f_code
        if "/torch/" not in code.co_filename and "normconvert" not in code.co_filename:
            where = f" ({code.co_filename.rsplit('site-packages/', 1)[-1]}:{frame.tb_lineno}, in {code.co_name})"
        frame = frame.tb_next
    what = "a size or a branch depends on values that the weights give, which no trace knows: " * isinstance(
        error, UNKNOWN_VALUE
    )
    return f"the model could not be traced: {what}{type(error).__name__}: {first_line(error)[:300]}{where}"


def _parameters(model: nn.Module, program: Any, graph: fx.Graph) -> dict[fx.Node, Parameter]:
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    unstored = set(signature.non_persistent_buffers)
    constants = signature.inputs_to_lifted_tensor_constants
    groups: dict[int, list[str]] = {}
    # All names: an edit of a shared tensor has to reach each of them.
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in tensors:
        groups.setdefault(id(tensor), []).append(name)
    aliases = {name: tuple(group) for group in groups.values() for name in group}
    found: dict[fx.Node, Parameter] = {}
    for node in graph.nodes:
        if node.op != "placeholder":
            continue
        if node.name in names:
            all_names = aliases.get(names[node.name], (names[node.name],))
            found[node] = Parameter(all_names[0], all_names, names[node.name] not in unstored)
        elif node.name in constants:
            value = program.constants.get(constants[node.name])
            known = isinstance(value, Tensor) and not (isinstance(value, FakeTensor) or value.is_meta)
            value = value.detach().clone() if known else torch.tensor(torch.nan)
            found[node] = Parameter(constants[node.name], (constants[node.name],), stored=False, value=value)
    return found


def _outputs(program: Any, graph: fx.Graph) -> dict[fx.Node, tuple[str, ...]]:
    """Names of the user's outputs, as paths in the nested output (``logits``, ``encoder_last_hidden_state``, ``0``)."""
    specs = list(program.graph_signature.output_specs)
    flat = next(n for n in graph.nodes if n.op == "output").args[0]
    user = [value for spec, value in zip(specs, flat, strict=True) if spec.kind.name == "USER_OUTPUT"]
    spec = program.call_spec.out_spec
    try:
        rebuilt = named_values(pytree.tree_unflatten(list(range(len(user))), spec))
        labels = {index: name for name, index in rebuilt if isinstance(index, int)}
    except Exception:  # an output class that cannot be rebuilt: number the outputs
        labels = {}
    names: dict[fx.Node, tuple[str, ...]] = {}
    for index, value in enumerate(user):
        if isinstance(value, fx.Node):
            names[value] = (*names.get(value, ()), labels.get(index, str(index)))
    return names
