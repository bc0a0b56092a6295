"""permute(x of six dimensions and more) -> reshapes and permutes of at most five, which every runtime for phones has.

A tensor of more dimensions is held as one of fewer, with the same elements in the same order: what reshapes it, rounds
it or cuts it works on that one, and a permutation becomes one or two of groups of dimensions that move together.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from torch.fx import Graph, GraphModule, Node

from deploykit.fusion.affine import PERMUTATIONS, RESHAPES, permutation
from deploykit.fusion.constants import operand

MOST_DIMENSIONS = 5

_ATEN = torch.ops.aten
_SAME_ORDER = (*RESHAPES, _ATEN.contiguous.default, _ATEN.clone.default)
_ELEMENTWISE = (
    torch.ops.quantized_decomposed.quantize_per_tensor.default,
    torch.ops.quantized_decomposed.dequantize_per_tensor.default,
)
_CUTS = (_ATEN.chunk.default, _ATEN.split.Tensor, _ATEN.split_with_sizes.default)
"""Of which the dimension is the third argument."""
_FOLDED = (*_SAME_ORDER, *_ELEMENTWISE, *PERMUTATIONS, *_CUTS, _ATEN.slice.Tensor, operator.getitem)

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Permutation:
    """A reshape to ``shape`` and the order in which its dimensions then stand."""

    shape: Shape
    order: Shape


def beyond_five(graph: Graph) -> Iterator[tuple[Node, int]]:
    """Yield every node that has a tensor of more than five dimensions and cannot be folded, with their number."""
    for node in graph.nodes:
        most = max(map(_rank, (node, *node.all_input_nodes)), default=0)
        if most <= MOST_DIMENSIONS:
            continue
        if node.target not in _FOLDED or (node.target in PERMUTATIONS and not permutations(*_permuted(node))):
            yield node, most


def fold_dimensions(module: GraphModule) -> None:
    """Write a module without tensors of more than five dimensions, in place, for a batch of one where it is dynamic.

    Every node that `beyond_five` would yield must be gone.
    """
    held: dict[Node, Node] = {}
    for node in list(module.graph.nodes):
        source = node.all_input_nodes[0] if node.all_input_nodes else node
        if _rank(node) <= MOST_DIMENSIONS and source not in held:
            continue
        with module.graph.inserting_before(node):
            folded = _folded(module.graph, node, held.get(source, source))
        if _rank(node) > MOST_DIMENSIONS:
            held[node] = folded
        else:
            node.replace_all_uses_with(folded)
    module.graph.eliminate_dead_code()
    module.recompile()


def permutations(shape: Shape, order: Shape) -> list[Permutation]:
    """Return the fewest permutations of at most five dimensions that together permute a tensor; none: there are no two.

    Args:
        shape: of the tensor.
        order: its dimensions in the order in which they are to stand.
    """
    whole = _grouped(shape, order)
    rank = len(whole.shape)
    if rank <= MOST_DIMENSIONS:
        return [whole]
    found = []
    for inner in itertools.combinations(range(1, rank), MOST_DIMENSIONS - 1):
        groups = [tuple(range(*ends)) for ends in itertools.pairwise((0, *inner, rank))]
        for chosen in itertools.permutations(groups):
            first = tuple(itertools.chain(*chosen))
            between = tuple(whole.shape[dimension] for dimension in first)
            second = _grouped(between, tuple(first.index(dimension) for dimension in whole.order))
            if len(second.shape) <= MOST_DIMENSIONS:
                found.append([_grouped(whole.shape, first), second])
    return min(found, key=lambda pair: sum(len(each.shape) for each in pair), default=[])


def _grouped(shape: Shape, order: Shape) -> Permutation:
    """Return a permutation with dimensions that move together as one, and without those of one element."""
    kept = [dimension for dimension in order if shape[dimension] != 1]
    last = {dimension: previous for previous, dimension in itertools.pairwise(sorted(kept))}
    groups: list[list[int]] = []
    for dimension in kept:
        if groups and last.get(dimension) == groups[-1][-1]:
            groups[-1].append(dimension)
        else:
            groups.append([dimension])
    places = sorted(groups)
    return Permutation(
        shape=tuple(math.prod(shape[dimension] for dimension in group) for group in places),
        order=tuple(places.index(group) for group in groups),
    )


def _folded(graph: Graph, node: Node, source: Node) -> Node:
    """Return what computes a node from ``source``, which holds the elements of what it reads."""
    if node.target in _SAME_ORDER:
        is_held = _rank(node) > MOST_DIMENSIONS
        return source if is_held else graph.call_function(_ATEN.reshape.default, (source, _shape(node)))
    if node.target in PERMUTATIONS:
        for step in permutations(*_permuted(node)):
            grouped = graph.call_function(_ATEN.reshape.default, (source, step.shape))
            source = graph.call_function(_ATEN.permute.default, (grouped, step.order))
        return source
    if node.target in _CUTS:
        grouped = _around(graph, node, source, node.args[2] if len(node.args) > 2 else 0)
        return graph.call_function(node.target, (grouped, node.args[1], 1))
    if node.target == _ATEN.slice.Tensor:
        grouped = _around(graph, node, source, node.args[1] if len(node.args) > 1 else 0)
        return graph.call_function(node.target, (grouped, 1, *node.args[2:]))
    return graph.call_function(node.target, (source, *node.args[1:]), dict(node.kwargs))  # type: ignore[arg-type]


def _around(graph: Graph, node: Node, source: Node, dimension: object) -> Node:
    """Return what ``source`` holds of a node's input with the dimension that is cut as the second of three."""
    shape = _shape(node.all_input_nodes[0])
    place = int(dimension) % len(shape)  # type: ignore[call-overload]  # an index
    around = (math.prod(shape[:place]), shape[place], math.prod(shape[place + 1 :]))
    return graph.call_function(_ATEN.reshape.default, (source, around))


def _permuted(node: Node) -> tuple[Shape, Shape]:
    """Return the shape that a node permutes, and the order of its dimensions."""
    return _shape(operand(node, 0)), tuple(permutation(node))


def _rank(node: Node) -> int:
    """Return the most dimensions of what a node gives."""
    value = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else [value]
    return max((each.ndim for each in values if isinstance(each, torch.Tensor)), default=0)


def _shape(node: Node) -> Shape:
    """Return the shape of what a node gives, with one for a dynamic batch."""
    return tuple(map(_size, node.meta["val"].shape))


def _size(size: int | torch.SymInt) -> int:
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, 1)))
