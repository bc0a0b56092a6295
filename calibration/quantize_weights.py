"""Op(x, W, b) -> Op(x, DequantizeLinear(Wq), b + shift): the plan's integers in place of each float weight."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from deploykit.arrays import Array, FloatArray
from deploykit.calibration.placement import IntegerWeight
from deploykit.calibration.plan import QuantizationPlan
from deploykit.onnx_values import add_constant, floats_of

BIAS_LIMIT = 2**30
"""The largest int32 bias: the other half of the accumulator is for the products."""


def quantize_weights(
    *, integer_bias: bool, dynamic_operators: frozenset[str] = frozenset()
) -> Callable[[ir.Model, QuantizationPlan], QuantizationPlan]:
    """Make the pass for a backend.

    Args:
        integer_bias: write the biases of convolutions as int32 behind a DequantizeLinear, instead of float.
        dynamic_operators: operators that another pass quantizes.
    """

    def rewrite(model: ir.Model, plan: QuantizationPlan) -> QuantizationPlan:
        nodes = {node.name: node for node in model.graph}
        elsewhere = frozenset() if plan.imported else dynamic_operators
        for name, use in plan.placement.weights.items():
            if name in nodes and nodes[name].op_type not in elsewhere:
                _quantize(model.graph, nodes[name], use, plan, integer_bias=integer_bias)
        return plan

    return rewrite


def corrected_bias(
    graph: ir.Graph, node: ir.Node, use: IntegerWeight, plan: QuantizationPlan, channels: int
) -> FloatArray | None:
    """Return the bias ``(channels,)`` with the plan's correction; None where there is none to write."""
    shift = np.asarray(plan.bias_shift.get(str(node.name), 0.0), np.float32)
    old = graph.initializers.get(use.bias) if use.bias else None
    if old is None and (node.op_type == "MatMul" or not np.any(shift)):
        return None
    bias = np.zeros(channels, np.float32) if old is None else floats_of(old)
    return np.asarray(bias + shift, np.float32)


def replace_bias(node: ir.Node, use: IntegerWeight, bias: ir.Value) -> None:
    """Let a node, or the Add behind a MatMul, read another bias."""
    if node.op_type == "MatMul":
        add = next(iter(node.outputs[0].consumers()))
        add.replace_input_with([operand.name for operand in add.inputs if operand].index(use.bias), bias)
        return
    node.resize_inputs(max(3, len(node.inputs)))
    node.replace_input_with(2, bias)


def drop_unread(graph: ir.Graph, weight: ir.Value) -> None:
    """Remove a float weight that nothing reads any more."""
    if not list(weight.consumers()):
        del graph.initializers[str(weight.name)]


def _quantize(
    graph: ir.Graph, node: ir.Node, use: IntegerWeight, plan: QuantizationPlan, *, integer_bias: bool
) -> None:
    name, weight = str(node.name), graph.initializers[use.weight]
    values = floats_of(weight)
    bias = corrected_bias(graph, node, use, plan, values.shape[use.axis])
    in_integers = integer_bias and node.op_type == "Conv"
    step = np.float32(plan.range_of(use.input).affine()[0])
    least = _least_scales(bias, step) if in_integers and bias is not None else None
    integers, scales = plan.integers_of(name, values, use.axis, least)
    if bias is not None:
        written = (
            _integer_bias(graph, f"{name}/bias", bias, step * scales)
            if in_integers
            else add_constant(graph, f"{name}/bias", bias)
        )
        replace_bias(node, use, written)
    node.replace_input_with(1, _dequantized(graph, name, integers, scales, axis=use.axis))
    drop_unread(graph, weight)


def _least_scales(bias: FloatArray, step: np.float32) -> FloatArray:
    """Return the scales ``(channels,)`` below which a bias would not fit its integers."""
    return np.asarray(np.abs(bias) / (step * BIAS_LIMIT), np.float32)


def _integer_bias(graph: ir.Graph, name: str, bias: FloatArray, steps: FloatArray) -> ir.Value:
    integers = np.round(bias / steps.astype(np.float64)).astype(np.int32)
    return _dequantized(graph, name, integers, steps, axis=0)


def _dequantized(graph: ir.Graph, name: str, integers: Array, scales: FloatArray, *, axis: int) -> ir.Value:
    """Return Integers with zero point 0 behind a DequantizeLinear."""
    zeros = np.zeros(len(scales), integers.dtype)
    parts = [
        add_constant(graph, f"{name}/{part}", array)
        for part, array in (("integers", integers), ("scale", scales), ("zero_point", zeros))
    ]
    node = ir.node("DequantizeLinear", parts, {"axis": axis}, name=f"{name}/dequantize")
    node.outputs[0].name = f"{name}/restored"
    graph.append(node)
    return node.outputs[0]
