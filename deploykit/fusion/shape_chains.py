"""Which channels of a layer end where, through operators that only move numbers.

A tensor that holds each element's channel goes through reshapes, permutations and splits instead of the numbers.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node, map_arg

from deploykit.fusion.affine import PERMUTATIONS, channel_axis
from deploykit.fusion.constants import hint, sizes

_aten = torch.ops.aten
MOVES = frozenset(
    {
        *PERMUTATIONS,
        operator.getitem,
        _aten.alias.default,
        _aten.chunk.default,
        _aten.clone.default,
        _aten.contiguous.default,
        _aten.flatten.using_ints,
        _aten.narrow.default,
        _aten.reshape.default,
        _aten.roll.default,
        _aten.select.int,
        _aten.slice.Tensor,
        _aten.split.Tensor,
        _aten.split.sizes,
        _aten.split_with_sizes.default,
        _aten.squeeze.dim,
        _aten.unbind.int,
        _aten.unflatten.int,
        _aten.unsqueeze.default,
        _aten.view.default,
    }
)
"""Operators whose every output element is one input element."""


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """One reading of a layer's numbers by an operator that computes: which channels reach it, and as what."""

    reader: Node
    read: Node
    channels: Tensor


def arrivals(layer: Node) -> list[Arrival]:
    """Return every reading of what a layer gives, through any number of `MOVES`, in the graph's order.

    ``channels`` are the sorted, distinct channels ``(K,)`` of the layer's output in what is read.
    """
    axis, shape = channel_axis(layer), sizes(layer)
    index = torch.arange(shape[axis]).reshape([-1 if place == axis else 1 for place in range(len(shape))])
    moved: dict[Node, Any] = {layer: index.expand(shape)}
    found = []
    for node in layer.graph.nodes:
        read = [source for source in node.all_input_nodes if source in moved]
        if not read:
            continue
        if node.target in MOVES and node.args[0] is read[0]:
            moved[node] = _move(node, moved)
        else:
            found += [Arrival(reader=node, read=source, channels=moved[source]) for source in read]
    return [
        Arrival(reader=arrival.reader, read=arrival.read, channels=_distinct(arrival.channels)) for arrival in found
    ]


def origin(node: Node) -> Node:
    """Return what a node gets its numbers from, back through `MOVES`."""
    while node.target in MOVES and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def sources(module: GraphModule, target: Any) -> list[Node]:
    """Return the calls of an operator, in the graph's order."""
    return list(module.graph.find_nodes(op="call_function", target=target))


def _move(node: Node, moved: dict[Node, Any]) -> Any:
    def value(read: Node) -> Any:
        return moved[read] if read in moved else hint(read.meta["val"])

    return node.target(*map_arg(node.args, value), **map_arg(node.kwargs, value))  # type: ignore[operator]


def _distinct(channels: Any) -> Tensor:
    parts = channels if isinstance(channels, (list, tuple)) else [channels]
    distinct: Tensor = torch.unique(torch.cat([part.flatten() for part in parts]))
    return distinct
