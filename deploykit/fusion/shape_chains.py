"""Which channels of a layer end where, through operators that only move numbers.

A tensor that holds each element's channel goes through reshapes, permutations and splits instead of the numbers.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.fx import GraphModule, Node, map_arg

from deploykit.fusion.affine import PERMUTATIONS, RESHAPES, channel_axis
from deploykit.fusion.constants import Target, hint, operator_of, sizes

_aten = torch.ops.aten
MOVES = frozenset(
    {
        *PERMUTATIONS,
        *RESHAPES,
        operator.getitem,
        _aten.alias.default,
        _aten.chunk.default,
        _aten.clone.default,
        _aten.contiguous.default,
        _aten.narrow.default,
        _aten.roll.default,
        _aten.select.int,
        _aten.slice.Tensor,
        _aten.split.Tensor,
        _aten.split.sizes,
        _aten.split_with_sizes.default,
        _aten.unbind.int,
    }
)
"""Operators whose every output element is one input element."""


Moved: TypeAlias = Tensor | Sequence[Tensor]
"""The channel of each element of what a node gives: one tensor, or several where it splits."""


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
    moved: dict[Node, Moved] = {layer: index.expand(shape)}
    found: list[tuple[Node, Node]] = []
    for node in layer.graph.nodes:
        read = [source for source in node.all_input_nodes if source in moved]
        if not read:
            continue
        if node.target in MOVES and node.args[0] is read[0]:
            moved[node] = _move(node, moved)
        else:
            found += [(node, source) for source in read]
    return [Arrival(reader=reader, read=source, channels=_distinct(moved[source])) for reader, source in found]


def origin(node: Node) -> Node:
    """Return what a node gets its numbers from, back through `MOVES`."""
    while node.target in MOVES and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def sources(module: GraphModule, target: Target) -> list[Node]:
    """Return the calls of an operator, in the graph's order."""
    return list(module.graph.find_nodes(op="call_function", target=target))


def _move(node: Node, moved: dict[Node, Moved]) -> Moved:
    def value(read: Node) -> Moved | int:
        return moved[read] if read in moved else hint(read.meta["val"])

    parts: Moved = operator_of(node)(*map_arg(node.args, value), **map_arg(node.kwargs, value))
    return parts


def _distinct(channels: Moved) -> Tensor:
    parts = channels if not isinstance(channels, Tensor) else [channels]
    distinct: Tensor = torch.unique(torch.cat([part.flatten() for part in parts]))
    return distinct
