"""A quantized graph with its activations in float: what a quantized one is compared with, layer by layer."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from deploykit.arrays import Array, FloatArray
from deploykit.errors import SpecError
from deploykit.onnx_values import add_constant

PRODUCT = "MatMulInteger"
SCALED_PRODUCT = "MatMulIntegerToFloat"
"""A product in integers with its scales and its bias in one operator."""


def without_activation_quantizers(model: ir.Model) -> ir.Model:
    """Return a graph whose activations stay in float: what a quantizer cuts off below zero, a Relu does.

    Raises:
        SpecError: it quantizes no activations.
    """
    whole = model.clone()
    outputs = set(whole.graph.outputs)
    bypassed = 0
    for node in list(whole.graph):
        source = (
            node.inputs[0].producer() if node.op_type == "DequantizeLinear" and node.inputs[0] is not None else None
        )
        if source is None or source.op_type != "QuantizeLinear" or node.outputs[0] in outputs:
            continue
        value = source.inputs[0]
        if value is None:
            continue
        if _low_of(source) >= 0:
            relu = ir.node("Relu", [value], name=f"{node.name}/relu")
            whole.graph.insert_before(node, relu)
            value = relu.outputs[0]
            value.name = f"{node.outputs[0].name}/float"
        ir.convenience.replace_all_uses_with(node.outputs[0], value)
        bypassed += 1
    bypassed += _products_in_float(whole)
    if not bypassed:
        raise SpecError(
            "the engine quantizes no activations, so there is nothing to compare its layers with. Fix: give a "
            "reference: another bundle of the same backbone and runtime, such as the last release's."
        )
    return whole


def _low_of(quantizer: ir.Node) -> float:
    """Return the least value that a quantizer can give; minus infinity where that differs by channel."""
    scale, zero_point = (constant_of(quantizer, place) for place in (1, 2))
    if scale is None or scale.size != 1:
        return float("-inf")
    least = np.iinfo(str(zero_point.dtype)).min if zero_point is not None else 0
    return float(scale.item()) * (least - (int(zero_point.item()) if zero_point is not None else 0))


def _products_in_float(model: ir.Model) -> int:
    """Rewrite each product of activations that are quantized at each call; returns how many."""
    rewritten = 0
    for node in list(model.graph):
        source = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
        if source is None or source.op_type != "DynamicQuantizeLinear":
            continue
        write = {PRODUCT: _product, SCALED_PRODUCT: _scaled_product}.get(node.op_type)
        added = write(model, node, source) if write is not None else []
        if added:
            ir.convenience.replace_nodes_and_values(model.graph, node, [node], added, node.outputs, added[-1].outputs)
            added[-1].outputs[0].type = ir.TensorType(ir.DataType.FLOAT)  # was that of the sum of integers
            rewritten += 1
    return rewritten


def _product(model: ir.Model, node: ir.Node, source: ir.Node) -> list[ir.Node]:
    """MatMulInteger(q, W, zq, zw) -> MatMul(x / s, W - zw), with q, s, zq = DynamicQuantizeLinear(x)."""
    weight = _weight_of(node, 1, 3)
    if weight is None:
        return []
    steps = ir.node("Div", [source.inputs[0], source.outputs[1]], name=f"{node.name}/steps")
    constant = add_constant(model.graph, f"{node.name}/float_weight", weight)
    return [steps, ir.node("MatMul", [steps.outputs[0], constant], name=f"{node.name}/float_product")]


def _scaled_product(model: ir.Model, node: ir.Node, source: ir.Node) -> list[ir.Node]:
    """MatMulIntegerToFloat(q, W, s, sw, zq, zw, b) -> MatMul(x, (W - zw) sw) + b."""
    weight, scales = _weight_of(node, 1, 5), constant_of(node, 3)
    if weight is None or scales is None:
        return []
    constant = add_constant(model.graph, f"{node.name}/float_weight", weight * scales.astype(np.float32))
    added = [ir.node("MatMul", [source.inputs[0], constant], name=f"{node.name}/float_product")]
    bias = node.inputs[6] if len(node.inputs) > 6 else None
    if bias is not None:
        added.append(ir.node("Add", [added[0].outputs[0], bias], name=f"{node.name}/float_bias"))
    return added


def _weight_of(node: ir.Node, place: int, zero_point: int) -> FloatArray | None:
    """Return a constant operand in integers, less its zero point, in float."""
    integers, points = constant_of(node, place), constant_of(node, zero_point)
    if integers is None:
        return None
    floats = integers.astype(np.float32)
    return floats if points is None else floats - points.astype(np.float32)


def constant_of(node: ir.Node, place: int) -> Array | None:
    """Return what a node reads at a place, where that is a constant."""
    value = node.inputs[place] if len(node.inputs) > place else None
    return value.const_value.numpy() if value is not None and value.const_value is not None else None
