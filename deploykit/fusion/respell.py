"""reshape(x) -> view(x), chunk(x) -> split(x): the operators that torch decomposes into others that ONNX has too."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import SymInt, Tensor
from torch.fx import Graph, Node, map_arg
from torch.fx.node import Argument

from deploykit.fusion.constants import Size, argument

_aten = torch.ops.aten

Spelling: TypeAlias = Callable[[Graph, Node, Node], Node]
"""Writes into a graph what torch makes of a call, given what it reads there."""


def _flatten(graph: Graph, node: Node, source: Node) -> Node:
    return _reshaped(graph, source, list(node.meta["val"].shape))


def _reshape(graph: Graph, node: Node, source: Node) -> Node:
    contiguous = source.meta["val"].is_contiguous()
    return _reshaped(graph, source, list(argument(node, 1, "shape", ()) if contiguous else node.meta["val"].shape))


def _reshaped(graph: Graph, source: Node, shape: list[Size]) -> Node:
    """Write a view, or of values that lie too far apart for one, a view of a copy."""
    value: Tensor = source.meta["val"]
    shape = _told(shape)
    try:
        value.view(shape)
    except (RuntimeError, ValueError):  # of a tensor, and of an abstract one
        copied = _call(graph, _aten.clone.default, source, memory_format=torch.contiguous_format)
        copied.meta["val"] = value.clone(memory_format=torch.contiguous_format)
        return _call(graph, _aten._unsafe_view.default, copied, shape)
    return _call(graph, _aten.view.default, source, shape)


def _view(graph: Graph, node: Node, source: Node) -> Node:
    return _call(graph, _aten.view.default, source, _told(list(argument(node, 1, "size", ()))))


def _told(shape: list[Size]) -> list[Size]:
    """Return -1 for the one dynamic size of a view, which the others tell."""
    unknown = [isinstance(size, SymInt) or size == -1 for size in shape]
    return [-1 if each else size for each, size in zip(unknown, shape, strict=True)] if sum(unknown) == 1 else shape


def _chunk(graph: Graph, node: Node, source: Node) -> Node:
    count, dim = argument(node, 1, "chunks", 1), argument(node, 2, "dim", 0)
    return _call(graph, _aten.split.Tensor, source, -(-source.meta["val"].shape[dim] // count), dim)


def _narrow(graph: Graph, node: Node, source: Node) -> Node:
    dim, start, length = (argument(node, at, name, 0) for at, name in enumerate(("dim", "start", "length"), 1))
    return _call(graph, _aten.slice.Tensor, source, dim, start, start + length)


def _call(graph: Graph, target: torch._ops.OpOverload, *arguments: Argument, **settings: Argument) -> Node:
    return graph.create_node("call_function", target, arguments, settings, name=target.overloadpacket.__name__)


RESPELLED: dict[object, Spelling] = {
    _aten.flatten.using_ints: _flatten,
    _aten.reshape.default: _reshape,
    _aten.chunk.default: _chunk,
    _aten.narrow.default: _narrow,
    _aten.view.default: _view,
}
"""Operators that become others, or are written otherwise, by what writes those."""

_NAMED_ANEW = (_aten.split.Tensor, _aten.slice.Tensor)
"""What is counted together with what the others become."""


def respell(graph: Graph) -> tuple[Graph, dict[str, str]]:
    """Return a copy of a graph as torch's decompositions write it, and its new names by the old ones."""
    copy, made = Graph(), dict[Node, Node]()
    for node in graph.nodes:
        spelling = RESPELLED.get(node.target)
        if spelling is not None:
            made[node] = spelling(copy, node, made[node.args[0]])
        elif node.target in _NAMED_ANEW:
            made[node] = _call(
                copy, node.target, *map_arg(node.args, made.__getitem__), **map_arg(node.kwargs, made.__getitem__)
            )
        else:
            made[node] = copy.node_copy(node, made.__getitem__)
        made[node].meta = dict(node.meta)
    return copy, {node.name: other.name for node, other in made.items()}
