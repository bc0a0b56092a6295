"""f(x)[:, :k] -> f(x[:, :k]): of a tensor of which a few rows are read, only those are computed.

A plain ViT's head reads the class token alone, so its last block needs one query, and its MLP one row.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node, map_arg

from deploykit.fusion.affine import LINEAR, PERMUTATIONS, permutation
from deploykit.fusion.constants import (
    ATTENTION,
    add_call,
    argument,
    operand,
    operator_of,
    replace,
    same_size,
    shape_of,
    tidy,
)
from deploykit.fusion.drop_identities import mutates

_aten = torch.ops.aten
_SELECT, _SLICE, _MATMUL = _aten.select.int, _aten.slice.Tensor, _aten.matmul.default
_WORK = (LINEAR, ATTENTION, _MATMUL)
_LEAST_SAVING = 2
"""All rows over those that are read, from which on the work saved is more than the slices cost."""


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """``start`` to ``end`` along an axis, counted from the front."""

    axis: int
    start: int
    end: int

    @property
    def count(self) -> int:
        """How many."""
        return self.end - self.start


def cut_unread_rows(module: GraphModule) -> int:
    """Cut rows before the linears, attention and matrix products that give them, instead of after.

    Exact: every sum stays. What another output needs whole stays whole for that output, and the few rows are
    computed beside it, so that a graph that is cut to either output has no more than it needs. Left alone: rows
    of which something on the way to the same output needs more (keys and values, a mean over tokens), more than
    half of all rows, steps, rows that convolutions, windows or splits give, and graphs that write in place.

    Returns:
        How many operators compute fewer rows.
    """
    if any(mutates(node) for node in module.graph.nodes):
        return 0
    count = sum(_cut(source) for source in list(module.graph.nodes))
    if count:
        tidy(module)
    return count


def _cut(source: Node) -> int:
    """Compute those rows of a tensor that all cuts of it take; returns how many operators compute fewer."""
    found = {node: rows for node in source.users if (rows := _rows_of(node)) is not None and node.args[0] is source}
    whole = shape_of(source)
    cuts = {node: rows for node, rows in found.items() if rows.count * _LEAST_SAVING <= whole[rows.axis]}
    if len({rows.axis for rows in cuts.values()}) != 1:
        return 0
    axis = next(iter(cuts.values())).axis
    start, end = min(rows.start for rows in cuts.values()), max(rows.end for rows in cuts.values())
    if (end - start) * _LEAST_SAVING > whole[axis]:
        return 0
    narrow = _narrow(source, axis, cuts)
    if not any(node.target in _WORK for node in narrow):
        return 0
    made: dict[tuple[Node, int], Node] = {}
    for node in list(source.graph.nodes):
        if node in narrow:
            made[node, narrow[node]] = _computed(node, _Rows(axis=narrow[node], start=start, end=end), made)
    for node, rows in cuts.items():
        places = (rows.start - start,) if node.target == _SELECT else (rows.start - start, rows.end - start)
        replace(node, add_call(node, operator_of(node), made[source, axis], axis, *places))
    return len(narrow)


def _rows_of(node: Node) -> _Rows | None:
    """Return what a call cuts out of its first argument; None for anything but neighbouring rows of a known number."""
    if node.target not in (_SELECT, _SLICE):
        return None
    shape = shape_of(operand(node, 0))
    axis = argument(node, 1, "dim", 0) % len(shape)
    size, start = shape[axis], argument(node, 2, "index" if node.target == _SELECT else "start", None)
    end = argument(node, 3, "end", None) if node.target == _SLICE else None
    if not all(isinstance(place, int) for place in (size, start or 0, end or 0)) or argument(node, 4, "step", 1) != 1:
        return None
    first, last, _ = slice(start, end).indices(size)
    rows = _Rows(axis=axis, start=first, end=first + 1 if node.target == _SELECT else last)
    return rows if rows.count > 0 else None


def _narrow(source: Node, axis: int, cuts: Collection[Node]) -> dict[Node, int]:
    """Return every operator of which the rows of the cuts will do, and which axis they lie along."""
    needed = _needed_with(cuts)
    narrow: dict[Node, int] = {}
    for node in reversed(source.graph.nodes):
        axes = {
            (_operand_axes(reader, narrow[reader]) or {})[node] if reader in narrow else None
            for reader in node.users
            if reader in needed and reader not in cuts
        }
        axes |= {axis} if node is source else set()
        (only,) = axes if len(axes) == 1 else (None,)
        if only is not None and _operand_axes(node, only) is not None:
            narrow[node] = only
    return narrow


def _needed_with(cuts: Collection[Node]) -> set[Node]:
    """Return every operator on a way to an output that the cuts lead to."""
    reached = set(cuts)
    for node in next(iter(cuts)).graph.nodes:
        if node.op != "output" and any(source in reached for source in node.all_input_nodes):
            reached.add(node)
    (output,) = next(iter(cuts)).graph.find_nodes(op="output")
    needed = {node for node in output.all_input_nodes if node in reached}
    for node in reversed(output.graph.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    return needed


def _operand_axes(node: Node, axis: int) -> dict[Node, int | None] | None:
    """Along which axis of each operand the rows lie that give those of ``node``; None: that operand stays whole.

    None in the place of all for an operator whose rows do not come from rows of its operands.
    """
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    if torch.Tag.pointwise in node.target.tags:
        return {operand: _broadcast(operand, axis, len(shape_of(node))) for operand in node.all_input_nodes}
    source, rest = node.args[0], node.all_input_nodes[1:]
    if node.target not in _RULES or not isinstance(source, Node) or source in node.args[1:]:
        return None
    before = _RULES[node.target](source, node, axis)
    if before is None:
        return None
    mask = argument(node, 3, "attn_mask", None) if node.target == ATTENTION else None
    rank = len(shape_of(node))
    return {source: before, **{other: _broadcast(other, axis, rank) if other is mask else None for other in rest}}


def _broadcast(operand: Node, axis: int, rank: int) -> int | None:
    """Return where an axis of a result of so many axes lies in an operand; None where that is the same along it."""
    shape = shape_of(operand)
    place = axis - (rank - len(shape))
    return place if place >= 0 and shape[place] != 1 else None


def _computed(node: Node, rows: _Rows, made: dict[tuple[Node, int], Node]) -> Node:
    """Return the rows of a call, computed from rows of its operands: those that are ``made``, or cut here."""
    axes = _operand_axes(node, rows.axis) or {}

    def narrowed(operand: Node) -> Node:
        axis = axes[operand]
        if axis is None:
            return operand
        if (operand, axis) not in made:
            made[operand, axis] = add_call(node, _SLICE, operand, axis, rows.start, rows.end)
        return made[operand, axis]

    arguments: Any = map_arg(node.args, narrowed)
    settings = map_arg(node.kwargs, narrowed)
    if node.target == _aten.reshape.default and arguments[1][rows.axis] != -1:
        source, shape = arguments
        arguments = (source, [*shape[: rows.axis], rows.count, *shape[rows.axis + 1 :]])
    return add_call(node, operator_of(node), *arguments, **settings)


def _of_shape(source: Node, node: Node, axis: int) -> int | None:
    before, after = shape_of(source)[: axis + 1], shape_of(node)[: axis + 1]
    return axis if len(before) == len(after) and all(map(same_size, before, after)) else None


def _of_permutation(_: Node, node: Node, axis: int) -> int | None:
    return permutation(node)[axis]


def _of_layernorm(source: Node, node: Node, axis: int) -> int | None:
    return axis if axis < len(shape_of(source)) - len(argument(node, 1, "normalized_shape", ())) else None


def _of_softmax(source: Node, node: Node, axis: int) -> int | None:
    return axis if axis != argument(node, 1, "dim", -1) % len(shape_of(source)) else None


def _of_linear(source: Node, _: Node, axis: int) -> int | None:
    return axis if axis < len(shape_of(source)) - 1 else None


def _of_matmul(source: Node, node: Node, axis: int) -> int | None:
    rank = len(shape_of(node))
    return axis if axis == rank - 2 and len(shape_of(source)) == rank else None


def _of_attention(source: Node, node: Node, axis: int) -> int | None:
    return axis if axis == len(shape_of(source)) - 2 and not argument(node, 5, "is_causal", False) else None


_RULES: dict[object, Callable[[Node, Node, int], int | None]] = {
    **dict.fromkeys(PERMUTATIONS, _of_permutation),
    **dict.fromkeys((_aten.reshape.default, _aten.flatten.using_ints, _aten.unflatten.int), _of_shape),
    _aten.layer_norm.default: _of_layernorm,
    _aten.softmax.int: _of_softmax,
    LINEAR: _of_linear,
    _MATMUL: _of_matmul,
    ATTENTION: _of_attention,
}
"""By operator, from its first argument, its call and an axis of the result: where the same rows lie in the argument."""
