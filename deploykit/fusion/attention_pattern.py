"""Self-attention in ONNX graphs: project, cut windows, split heads, softmax(q @ k^T * s + bias) @ v, merge heads."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from deploykit.arrays import Array
from deploykit.fusion.data_movement import (
    constant,
    is_static,
    joined_again,
    moved,
    only_reader,
    producer,
    sizes,
    source,
)
from deploykit.fusion.graph_writer import GraphWriter
from deploykit.onnx_values import shape_of_value


@dataclass(frozen=True, kw_only=True)
class JointProjection:
    """A linear layer that gives queries, keys and values ``(N, ..., 3 * H * D)`` of ``T`` tokens a sample."""

    tokens: ir.Value
    weight: ir.Value
    bias: ir.Value
    result: ir.Value

    @property
    def batch(self) -> int:
        """The samples that positions are followed for: those of the graph, or two where it takes any number."""
        shape = self.result.shape
        return shape[0] if shape is not None and isinstance(shape[0], int) else 2

    @property
    def count(self) -> int:
        """``T``."""
        return math.prod(sizes(self.result)[:-1])

    @property
    def width(self) -> int:
        """``H * D``."""
        return sizes(self.result)[-1] // 3


@dataclass(frozen=True, kw_only=True)
class SelfAttention:
    """One attention as it stands in a graph.

    ``before`` ``(windows, tokens of a window)`` are the tokens of each window, by their place in
    ``tokens``; ``after`` ``(T,)`` are the attended tokens, counted through the windows, as they stand in
    ``merged``.
    """

    projection: JointProjection
    scale: float
    position_bias: Array | None
    heads: int
    tokens: ir.Value
    before: Array
    merged: ir.Value
    after: Array


def replace_attentions(
    model: ir.Model,
    attend: Callable[[GraphWriter, SelfAttention, ir.Value], ir.Value],
    chosen: Callable[[SelfAttention], bool] = lambda _: True,
) -> int:
    """Write every attention that `match_attention` finds in another form, in place.

    Windows are cut before the projection, by one Gather of whole tokens that also rolls the map, and joined again
    by another.

    Args:
        model: an ONNX graph with shapes.
        attend: adds the new form; gets the tokens ``(N * windows, tokens of a window, C)``, gives what each
            attends to, ``(N * windows, tokens of a window, H * D)`` or with ``H, D`` apart.
        chosen: which attentions to write.

    Returns:
        How many attentions were written.
    """
    written = 0
    for node in list(model.graph):
        found = match_attention(node)
        if found is None or not chosen(found):
            continue
        last, (windows, area) = found.merged.producer(), found.before.shape
        assert last is not None  # noqa: S101  (a moved value; narrows the type)
        graph = GraphWriter(model=model, before=last, name=f"{found.merged.name}_attention")
        tokens = graph.taken(found.tokens, found.before.reshape(-1), "cut")
        tokens = graph.shaped(tokens, (area, sizes(found.tokens)[-1]), "windows")
        attended = graph.shaped(attend(graph, found, tokens), (windows * area, found.projection.width), "joined")
        attended = graph.taken(attended, found.after, "placed")
        attended = graph.shaped(attended, sizes(found.merged), "merged")
        ir.convenience.replace_all_uses_with(found.merged, attended)
        written += 1
    if written:
        common.RemoveUnusedNodesPass()(model)
    return written


def match_attention(softmax: ir.Node) -> SelfAttention | None:
    """Return the attention of a joint projection, whole or in windows, whose probabilities a node gives.

    Where the parts lie is found by moving each number's position through the nodes between. None for
    anything but a softmax, half precision and Q/DQ graphs, separate projections, queries of fewer
    tokens, normalized queries, biases that are not constant, heads in another order, and in a graph of
    any batch a bias that differs from window to window.
    """
    if softmax.op_type != "Softmax":
        return None
    scores = _scores(softmax)
    product = only_reader(softmax.outputs[0])
    if scores is None or product is None or product.op_type != "MatMul" or product.inputs[0] is not softmax.outputs[0]:
        return None
    query, keys, scale, position_bias = scores
    projection = _projection(source(query))
    values, attended = product.inputs[1], product.outputs[0]
    if projection is None or values is None or source(keys) is not projection.result:
        return None
    layout = _windows(projection, query, keys, values)
    if layout is None:
        return None
    heads, before = layout
    joined = _joined(attended, projection.batch, heads, before)
    bias = None if position_bias is None else _bias_of_windows(position_bias, projection, heads, len(before))
    if joined is None or (bias is None and position_bias is not None):
        return None
    merged, after = joined
    tokens, before = _unrolled(projection, before)
    return SelfAttention(
        projection=projection,
        scale=scale,
        position_bias=bias,
        heads=heads,
        tokens=tokens,
        before=before,
        merged=merged,
        after=after,
    )


def _scores(softmax: ir.Node) -> tuple[ir.Value, ir.Value, float, Array | None] | None:
    """Queries, transposed keys, scale and position bias of the scores that a softmax reads."""
    if softmax.attributes.get_int("axis", -1) not in (-1, 3):
        return None
    node, position_bias = producer(softmax.inputs[0]), None
    if node is not None and node.op_type == "Add":
        constants = [value for value in node.inputs if constant(value) is not None]
        computed = [value for value in node.inputs if constant(value) is None]
        if len(constants) != 1:
            return None
        position_bias, node = constant(constants[0]), producer(computed[0])
        if position_bias is None or position_bias.ndim not in (3, 4):
            return None
    if node is None or node.op_type != "MatMul" or node.inputs[0] is None or node.inputs[1] is None:
        return None
    query, scale = node.inputs[0], 1.0
    scaling = producer(query)
    if scaling is not None and scaling.op_type == "Mul" and scaling.inputs[0] is not None:
        factor = constant(scaling.inputs[1])
        if factor is None or factor.size != 1:
            return None
        query, scale = scaling.inputs[0], float(factor.reshape(()))
    return query, node.inputs[1], scale, position_bias


def _projection(result: ir.Value) -> JointProjection | None:
    """Return the linear layer that gives a value ``(N, ..., 3 * H * D)`` of static size but for the batch."""
    add, shape = producer(result), result.shape
    if add is None or add.op_type != "Add" or result.dtype != ir.DataType.FLOAT or shape is None or len(shape) < 3:
        return None
    if not is_static(result) or sizes(result)[-1] % 3:
        return None
    for product, bias in (add.inputs, add.inputs[::-1]):
        matmul, vector = producer(product), constant(bias)
        if matmul is None or matmul.op_type != "MatMul" or vector is None or vector.ndim != 1:
            continue
        tokens, weight = matmul.inputs
        matrix = constant(weight)
        if matrix is not None and matrix.ndim == 2 and is_static(tokens) and len(matmul.outputs[0].uses()) == 1:
            assert tokens is not None and weight is not None and bias is not None  # noqa: S101  (narrow types)
            return JointProjection(tokens=tokens, weight=weight, bias=bias, result=result)
    return None


def _windows(
    projection: JointProjection, query: ir.Value, keys: ir.Value, values: ir.Value
) -> tuple[int, Array] | None:
    """The number of heads and the tokens of each window, when the parts lie in the projection as the operator has them.

    Queries, keys and values are ``(M, groups, tokens of a window, D)``, where windows count to the
    batch or to the groups.
    """
    batch, count, width = projection.batch, projection.count, projection.width
    numbers = np.arange(batch * count * 3 * width).reshape(batch, *sizes(projection.result))
    parts = [moved(value, projection.result, numbers) for value in (query, keys, values)]
    found = [part for part in parts if part is not None and part.ndim == 4]
    if len(found) < 3:
        return None
    found[1] = found[1].swapaxes(2, 3)
    area, depth = found[0].shape[2:]
    shape = (batch, count // area, width // depth, area, depth)
    if any(part.size != math.prod(shape) or part.shape[2:] != (area, depth) for part in found):
        return None
    order = found[0].reshape(shape)[0, :, 0, :, 0] // (3 * width)
    if order.max() >= count:
        return None
    ordered = numbers.reshape(batch, count, 3, width // depth, depth)[:, order].transpose(3, 0, 1, 4, 2, 5)
    same = all(np.array_equal(part.reshape(shape), other) for part, other in zip(found, ordered, strict=True))
    return (width // depth, order) if same else None


def _joined(attended: ir.Value, batch: int, heads: int, order: Array) -> tuple[ir.Value, Array] | None:
    """The last value that holds attended tokens alone, their heads beside each other, and which token stands where.

    ``attended`` is ``(M, groups, tokens of a window, D)`` for the windows of ``order``.
    """
    if not is_static(attended) or len(sizes(attended)) != 3:
        return None
    groups, area, depth = sizes(attended)
    numbers = np.arange(batch * heads * order.size * depth).reshape(-1, groups, area, depth)
    tokens = numbers.reshape(batch, len(order), heads, area, depth).swapaxes(2, 3).reshape(batch, order.size, -1)
    value, found = attended, None
    while (following := _moved_on(value)) is not None:
        value = following
        after = moved(value, attended, numbers)
        if (
            after is None
            or not is_static(value)
            or after.ndim < 3
            or len(after) != batch
            or after.shape[-1] != tokens.shape[-1]
        ):
            continue
        after = after.reshape(batch, -1, tokens.shape[-1])
        window, place = np.divmod(after[0, :, 0], heads * area * depth)
        places = window * area + place // depth
        if places.max() < order.size and np.array_equal(after, tokens[:, places]):
            found = value, places
    return found


def _moved_on(value: ir.Value) -> ir.Value | None:
    """Return what becomes of a value whose numbers are moved and read by nothing else."""
    reader = only_reader(value)
    if reader is not None and reader.op_type in ("Reshape", "Transpose", "Slice"):
        return reader.outputs[0]
    return joined_again(value)


def _unrolled(projection: JointProjection, order: Array) -> tuple[ir.Value, Array]:
    """Return the tokens before whole ones are moved, ``(N, ..., C)``, and what ``order`` then is."""
    tokens, batch, channels = projection.tokens, projection.batch, sizes(projection.tokens)[-1]
    origin = source(tokens)
    if len(order) == 1 or not is_static(origin) or sizes(origin)[-1:] != (channels,):
        return tokens, order
    numbers: Array = np.arange(batch * math.prod(sizes(origin))).reshape(batch, *sizes(origin))
    moved_numbers = moved(tokens, origin, numbers)
    if moved_numbers is None:
        return tokens, order
    rolled, numbers = moved_numbers.reshape(batch, -1, channels), numbers.reshape(batch, -1, channels)
    places = rolled[0, :, 0] // channels
    if places.max() >= numbers.shape[1] or not np.array_equal(rolled, numbers[:, places]):
        return tokens, order
    return origin, places[order]


def _bias_of_windows(bias: Array, projection: JointProjection, heads: int, windows: int) -> Array | None:
    """``(1 or N * windows, 1 or heads, T, T)`` of what is added to scores ``(M, groups, T, T)``; None: no such form."""
    bias = bias if bias.ndim == 4 else bias[None]
    if len(bias) != 1:
        return None
    if bias.shape[1] in (1, heads):
        return bias
    if not isinstance(shape_of_value(projection.result)[0], int) or bias.shape[1] != windows * heads:
        return None
    return np.tile(bias.reshape(windows, heads, *bias.shape[2:]), (projection.batch, 1, 1, 1))
