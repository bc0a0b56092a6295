"""Where numbers go in an ONNX graph: nodes that only move them, followed by moving each number's position.

Slices, permutations, splits and joins may spell one movement in many ways; what they do to an array of
positions is the same for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from deploykit.arrays import Array

_MOVES = ("Reshape", "Transpose", "Split", "Squeeze", "Slice", "Concat")
_CUTS = ("Split", "Slice")


def constant(value: ir.Value | None) -> Array | None:
    """Return the numbers of a constant; None where a value is computed."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return None if tensor is None else tensor.numpy()


def is_static(value: ir.Value | None) -> bool:
    """Return whether every size of a value but the first, its batch, is known."""
    return value is not None and value.shape is not None and len(sizes(value)) == len(value.shape) - 1


def sizes(value: ir.Value | None) -> tuple[int, ...]:
    """Return the sizes of a static value but the first, its batch."""
    shape = value.shape if value is not None else None
    return () if shape is None else tuple(side for side in shape[1:] if isinstance(side, int))


def producer(value: ir.Value | None) -> ir.Node | None:
    """Return the node that gives a value, unless the value is an output of the graph."""
    return value.producer() if value is not None and not value.is_graph_output() else None


def only_reader(value: ir.Value) -> ir.Node | None:
    """Return the one node that reads a value, and that once; None where several do or the graph gives it out."""
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def source(value: ir.Value) -> ir.Value:
    """Return what a value gets all its numbers from, as far back as only moves lie between."""
    while (node := producer(value)) is not None and node.op_type in _MOVES and node.inputs[0] is not None:
        before = node.inputs[0] if node.op_type != "Concat" else _cut_from(node.inputs)
        if before is None:
            break
        value = before
    return value


def moved(value: ir.Value, origin: ir.Value, numbers: Array) -> Array | None:
    """Return what ``value`` is when ``origin`` is ``numbers``; None where anything but a move is between."""
    if value is origin:
        return numbers
    node = producer(value)
    if node is None or node.op_type not in _MOVES:
        return None
    moving = node.inputs if node.op_type == "Concat" else node.inputs[:1]
    parts = [moved(part, origin, numbers) for part in moving if part is not None]
    before = [part for part in parts if part is not None]
    if not before or len(before) < len(parts):
        return None
    try:
        return _move(node, before, value.index() or 0)
    except (ValueError, IndexError):  # a shape that the example's batch does not fit
        return None


def joined_again(value: ir.Value) -> ir.Value | None:
    """Return what the parts that a value is cut into are joined to, where nothing else reads the value or a part."""
    joins: set[ir.Node | None] = set()
    for cut, _ in value.uses():
        if cut.op_type not in _CUTS or cut.inputs[0] is not value:
            return None
        joins.update(only_reader(part) for part in cut.outputs)
    join = joins.pop() if len(joins) == 1 else None
    if value.is_graph_output() or join is None or join.op_type != "Concat" or _cut_from(join.inputs) is not value:
        return None
    return join.outputs[0]


def _cut_from(parts: Sequence[ir.Value | None]) -> ir.Value | None:
    """Return the one value that all parts are cut from."""
    whole: ir.Value | None = None
    for part in parts:
        node = producer(part)
        if node is None or node.op_type not in _CUTS or whole not in (None, node.inputs[0]):
            return None
        whole = node.inputs[0]
    return whole


def _move(node: ir.Node, before: list[Array], position: int) -> Array | None:
    first, axis = before[0], node.attributes.get_int("axis", 0)
    second = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    if node.op_type == "Concat":
        return np.concatenate(before, axis)
    if node.op_type == "Transpose":
        return first.transpose(node.attributes.get_ints("perm", tuple(reversed(range(first.ndim)))))
    if node.op_type == "Split":
        cuts = len(node.outputs) if second is None else np.cumsum(second)[:-1]
        return np.split(first, cuts, axis)[position]
    return None if second is None else _placed(node, first, second)


def _placed(node: ir.Node, before: Array, second: Array) -> Array | None:
    if node.op_type == "Reshape":
        return before.reshape([before.shape[place] if size == 0 else size for place, size in enumerate(second)])
    if node.op_type == "Squeeze":
        return before.squeeze(tuple(int(place) for place in second))
    return _sliced(node, before)


def _sliced(node: ir.Node, before: Array) -> Array | None:
    given = [constant(value) for value in node.inputs[1:]]
    if len(given) < 3 or any(values is None for values in given):
        return None
    starts, ends, axes, *steps = (values.tolist() for values in given if values is not None)
    cuts = [slice(None)] * before.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps[0] if steps else [1] * len(axes), strict=True):
        cuts[axis] = slice(start, end, step)
    return before[tuple(cuts)]
