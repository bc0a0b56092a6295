"""a * gate(mean(a)) -> a * Resize(gate(GlobalAveragePool(a))), or the gate on the next layer's weights, in ONNX graphs.

ONNX Runtime keeps maps in blocks of channels between convolutions. It has no mean and no product with a gate
``(N, C, 1, 1)`` in that layout, and copies each map out of it and back in; it has the pooling operator, nearest
resizing, and products of equal shapes. Where maps are large, one image at a time, a gate of the next
convolution's inputs is cheaper on its weights, if that has far fewer outputs: Conv(w)(a * g) = Conv(w * g)(a).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from deploykit.fusion.data_movement import constant, only_reader, producer, sizes
from deploykit.fusion.graph_writer import GraphWriter
from deploykit.onnx_values import shape_of_value

LARGE = 400
"""Positions of a map from which on gated weights are faster than a gated map (14 x 14: slower, 28 x 28: faster)."""


@dataclass(frozen=True, kw_only=True)
class _Gate:
    """``product = gated * gate(mean(gated))``: ``gated`` is ``(N, C, H, W)``, ``gate`` ``(N, C, 1, 1)``."""

    product: ir.Node
    gated: ir.Value
    gate: ir.Value
    mean: ir.Node
    positions: tuple[int, int]


def fuse_gates(model: ir.Model) -> int:
    """Write squeeze-and-excitation (Hu et al. 2018) in the form that stays in ONNX Runtime's blocked layout, in place.

    Exact in real arithmetic. Left alone: half precision and Q/DQ graphs, gates of something else than
    the map's own mean, maps whose height and width are not static, and gates from layers whose inputs
    are not whole fours of channels, which have no blocked layout.

    Returns:
        How many gates were written.
    """
    written = 0
    for gate in [gate for node in model.graph if node.op_type == "Mul" for gate in _gates(node)]:
        layer = only_reader(gate.product.outputs[0])
        if layer is not None and _takes_gate(layer, gate):
            _gate_weights(model, layer, gate)
        elif _is_blocked(gate.gate):
            _gate_map(model, gate)
        else:
            continue
        _pool(model, gate.mean)
        written += 1
    if written:
        common.RemoveUnusedNodesPass()(model)
    return written


def _is_blocked(gate: ir.Value) -> bool:
    """Return whether a gate comes from a convolution in blocks, which take whole fours of channels."""
    node = producer(gate)
    while node is not None and node.op_type != "Conv":
        node = producer(node.inputs[0])
    weight = constant(node.inputs[1]) if node is not None else None
    return weight is not None and weight.shape[1] % 4 == 0


def _gates(product: ir.Node) -> list[_Gate]:
    for gated, gate in (product.inputs, product.inputs[::-1]):
        shape = gated.shape if gated is not None else None
        if gated is None or gate is None or shape is None or len(shape) != 4 or gated.dtype != ir.DataType.FLOAT:
            continue
        _, _, high, wide = shape
        if not isinstance(high, int) or not isinstance(wide, int) or high * wide == 1:
            continue
        before, mean = producer(gated), _mean_behind(gate)
        if mean is not None and mean.inputs[0] is gated and before is not None and before.op_type != "DequantizeLinear":
            return [_Gate(product=product, gated=gated, gate=gate, mean=mean, positions=(high, wide))]
    return []


def _mean_behind(gate: ir.Value) -> ir.Node | None:
    """Return the mean over all positions from which alone a value ``(N, C, 1, 1)`` is computed."""
    pending, means, seen = [gate], set(), set()
    while pending:
        value = pending.pop()
        node = producer(value)
        if node is None or value.shape is None or tuple(value.shape[2:]) != (1, 1):
            return None
        if node.op_type == "ReduceMean":
            means.add(node)
        elif node not in seen:
            seen.add(node)
            pending.extend(part for part in node.inputs if part is not None and constant(part) is None)
    return means.pop() if len(means) == 1 and _over_positions(*means) else None


def _over_positions(mean: ir.Node) -> bool:
    axes = constant(mean.inputs[1]) if len(mean.inputs) > 1 else None
    kept = mean.attributes.get_int("keepdims", 1) == 1
    return axes is not None and sorted(axes % 4) == [2, 3] and kept


def _takes_gate(layer: ir.Node, gate: _Gate) -> bool:
    """Return whether a gate may stand on the weights of the layer that reads the product, and is faster there."""
    if layer.op_type != "Conv" or layer.inputs[0] is not gate.product.outputs[0]:
        return False
    weight, settings, batch = constant(layer.inputs[1]), layer.attributes, shape_of_value(gate.gated)[0]
    pointwise = weight is not None and weight.shape[2:] == (1, 1) and settings.get_int("group", 1) == 1
    narrow = weight is not None and 2 * weight.shape[0] <= weight.shape[1]  # else its result is as dear to copy back
    plain = not any(settings.get_ints("pads", ())) and set(settings.get_ints("strides", ())) <= {1}
    return pointwise and narrow and plain and batch == 1 and math.prod(gate.positions) >= LARGE


def _pool(model: ir.Model, mean: ir.Node) -> None:
    (value,) = mean.outputs
    graph = GraphWriter(model=model, before=mean, name=f"{value.name}")
    pooled = graph.node("GlobalAveragePool", [mean.inputs[0]], sizes(value), "pooled")
    ir.convenience.replace_all_uses_with(value, pooled)


def _gate_weights(model: ir.Model, layer: ir.Node, gate: _Gate) -> None:
    weight = layer.inputs[1]
    graph = GraphWriter(model=model, before=layer, name=f"{gate.product.outputs[0].name}")
    gated = graph.node("Mul", [weight, gate.gate], sizes(weight), "weights")
    layer.replace_input_with(0, gate.gated)
    layer.replace_input_with(1, gated)


def _gate_map(model: ir.Model, gate: _Gate) -> None:
    graph = GraphWriter(model=model, before=gate.product, name=f"{gate.product.outputs[0].name}")
    scales = graph.constant(np.array([1, 1, *gate.positions], np.float32), "scales")
    nearest = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    shape = (*sizes(gate.gate)[:1], *gate.positions)
    spread = graph.node("Resize", [gate.gate, None, scales], shape, "gate", nearest)
    gate.product.replace_input_with(list(gate.product.inputs).index(gate.gate), spread)
