"""Which calls of attention a linear attention could take the place of, and what there is to gain.

A call of ``scaled_dot_product_attention`` qualifies if every query may attend to every key (no causal mask, no mask of
padding, no bias), queries, keys and values are the same tokens, and these are a grid with, perhaps, other tokens before
it. Everything is read from the graph.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from normconvert.analysis.channel_axes import shape_of
from normconvert.analysis.token_grids import Grids, TokenGrid, find_grids
from normconvert.tracing.graph import Graph, module_path
from normconvert.tracing.operations import ATTENTION, COPIES, SOFTMAX, VIEWS, argument, name_of

PRODUCTS = {"aten.matmul", "aten.bmm", "aten.einsum"}
FILLED = {"aten.new_ones", "aten.new_zeros", "aten.new_full"}
"""Operations that take the dtype of an operand, and nothing else of it."""
LARGEST_MASK = 1 << 26
"""Elements of the largest mask whose values are computed."""


@dataclass(frozen=True)
class Attention:
    """The attention of a module.

    Attributes:
        path: of the module whose forward calls it.
        heads: of queries, keys and values.
        size: channels a head.
        tokens: that attend to each other, those before the grid included.
        grid: height and width, of all tokens or of a window.
        prefix: tokens before those of the grid.
        obstacle: why it cannot be linear, one clause in words; empty if it can.
    """

    path: str
    heads: int = 0
    size: int = 0
    tokens: int = 0
    grid: tuple[int, int] = (0, 0)
    prefix: int = 0
    obstacle: str = ""


def find_attentions(graph: Graph) -> list[Attention]:
    """The attention of each module that has one, in execution order."""
    grids = find_grids(graph.nodes)
    calls: dict[str, list[Attention]] = defaultdict(list)
    for node in graph.nodes:
        if name_of(node) == ATTENTION:
            calls[module_path(node)].append(_read(node, grids))
        elif _by_hand(node):
            reason = "its softmax is written by hand, so that there is no call that could be replaced"
            calls[module_path(node)].append(Attention(module_path(node), obstacle=reason))
    return [_one(path, found) for path, found in calls.items()]


def _one(path: str, calls: list[Attention]) -> Attention:
    """What all calls of a module have in common."""
    refused = next((call for call in calls if call.obstacle), None)
    if refused is not None:
        return refused
    if not path:
        return Attention(path, obstacle="it is called by the model itself, and by no module of it")
    if len(set(calls)) > 1:
        return Attention(path, obstacle="it is called for several grids of tokens")
    return calls[0]


def _read(node: fx.Node, grids: dict[fx.Node, Grids]) -> Attention:
    """One call."""
    path = module_path(node)
    query, key, value = (argument(node, i, name) for i, name in enumerate(("query", "key", "value")))
    shapes = [shape_of(x) for x in (query, key, value)]
    reason = _refusal(node, shapes)
    if reason:
        return Attention(path, obstacle=reason)
    laid_out = [{g: s for g, s in grids.get(x, {}).items() if g.fills(2, x)} for x in (query, key, value)]
    if not all(laid_out):
        return Attention(path, obstacle="its tokens are not seen to be a grid that a convolution lays out")
    if laid_out[0] != laid_out[1] or laid_out[0] != laid_out[2]:
        return Attention(path, obstacle="its queries, keys and values are not the same tokens (cross-attention)")
    if len(laid_out[0]) > 1:
        return Attention(path, obstacle="its tokens are laid out as several grids")
    grid: TokenGrid = next(iter(laid_out[0]))
    heads, size = int(shapes[0][1]), int(shapes[0][3])
    return Attention(path, heads, size, grid.tokens, (grid.height, grid.width), grid.prefix)


def _refusal(node: fx.Node, shapes: list[tuple[Any, ...]]) -> str:
    """Why a call cannot be linear, whatever its tokens are; empty if it can."""
    mask = argument(node, 3, "attn_mask")
    known = None if mask is None else known_mask(mask)
    if argument(node, 5, "is_causal", False) or (known is not None and not bool(known.triu(1).any())):
        return "it is causal: no token attends to later ones"
    if mask is not None and (known is None or not bool(known.all())):
        return "it has a mask or a bias of positions, which a linear attention cannot take"
    if argument(node, 4, "dropout_p", 0.0):
        return "it drops out weights, of which a linear attention has none"
    if any(len(shape) != 4 for shape in shapes):
        return "its heads are no dimension of their own: expected (batch, heads, tokens, channels)"
    if shapes[0][2] != shapes[1][2]:
        return "its queries and keys are different tokens (cross-attention, or keys of a coarser grid)"
    if len(set(shapes)) > 1:
        return "its queries, keys and values differ in shape"
    if not all(isinstance(n, int) for n in shapes[0][1:]):
        return "it takes any number of tokens"
    return ""


def known_mask(mask: fx.Node) -> Tensor | None:
    """The values of a mask, whether of truth values or added, as truth values; None if they depend on anything."""
    nodes: set[fx.Node] = set()
    work = [mask]
    while work:
        node = work.pop()
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or value.numel() > LARGEST_MASK:
            return None
        seeded = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        if node.op != "call_function" or seeded or not all(isinstance(n, int) for n in value.shape):
            return None
        if node not in nodes:
            nodes.add(node)
            work.extend(node.all_input_nodes if name_of(node) not in FILLED else ())
    found: dict[fx.Node, Any] = {}
    for node in (n for n in mask.graph.nodes if n in nodes):
        if name_of(node) in FILLED:  # the operand is asked for its dtype alone
            found.update((x, torch.empty(0, dtype=x.meta["val"].dtype)) for x in node.all_input_nodes if x not in found)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), found.__getitem__)
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        found[node] = node.target(*args, **kwargs)
    result: Tensor = found[mask]
    return result if result.dtype == torch.bool else result == 0


def _by_hand(node: fx.Node) -> bool:
    """Whether a product's weights are a softmax of another product: attention without a call."""
    if name_of(node) not in PRODUCTS:
        return False
    weights = _behind(node.all_input_nodes[0], COPIES | {"aten.dropout"})
    if weights is None or name_of(weights) not in SOFTMAX:
        return False
    scores = _behind(weights.all_input_nodes[0], COPIES | VIEWS | {"aten.mul", "aten.div", "aten.add", "aten.where"})
    return scores is not None and name_of(scores) in PRODUCTS


def _behind(node: fx.Node, passed: set[str]) -> fx.Node | None:
    """The first operation, back along first operands, that is none of ``passed``."""
    while name_of(node) in passed:
        if not node.all_input_nodes:
            return None
        node = node.all_input_nodes[0]
    return node
