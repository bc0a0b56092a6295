"""MatMul(x, W) -> DequantizeLinear(QuantizeLinear(MatMul(DequantizeLinear(QuantizeLinear(x)), W))), in uint16.

The NPU multiplies integers where both what a product reads and what it writes are integers of one width. A plan has no
range for what a linear writes; that of all that it can write follows from the range of its input and its weights. Such
a range is wide, which 16 bits have room for.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from deploykit.arrays import FloatArray
from deploykit.backends.onnxruntime.static_products import split_gemm
from deploykit.calibration.placement import IntegerWeight
from deploykit.calibration.plan import QuantizationPlan
from deploykit.onnx_values import add_constant, array_of

_TOP = 65535


def widen_linears(model: ir.Model, plan: QuantizationPlan) -> QuantizationPlan:
    """Put uint16 pairs before and behind every planned linear, in place; comes after `quantize_weights`."""
    graph = model.graph
    for name, use in plan.placement.weights.items():
        node = next((node for node in graph if node.name == name), None)
        if node is not None and node.op_type == "Gemm":
            node = split_gemm(graph, node)
        if node is not None and node.op_type == "MatMul":
            _widen(graph, node, use, plan)
    return plan


def _widen(graph: ir.Graph, node: ir.Node, use: IntegerWeight, plan: QuantizationPlan) -> None:
    source, product = node.inputs[0], node.outputs[0]
    assert source is not None  # noqa: S101  (an operand that the operator requires; narrows the type)
    measured = plan.range_of(use.input)
    low, high = min(measured.low, 0.0), max(measured.high, 0.0)
    node.replace_input_with(0, _pair(graph, source, f"{node.name}/input", low, high))
    least, most = reach(_weight_of(node), low, high)
    readers = list(product.uses())
    restored = _pair(graph, product, f"{node.name}/output", least, most)
    for reader in readers:
        reader.node.replace_input_with(reader.idx, restored)
    if product.is_graph_output():
        name = product.name
        restored.shape, restored.type = product.shape, product.type
        graph.outputs[list(graph.outputs).index(product)] = restored
        product.name = f"{name}/float"
        restored.name = name


def reach(weight: FloatArray, low: float, high: float) -> tuple[float, float]:
    """Return the least and the largest value of ``x @ weight`` for every x between two bounds.

    Args:
        weight: ``(K, M)``.
        low: of each element of x, at most 0.
        high: of each element of x, at least 0.
    """
    positive, negative = np.maximum(weight, 0).sum(axis=0), np.minimum(weight, 0).sum(axis=0)
    return float((positive * low + negative * high).min()), float((positive * high + negative * low).max())


def _weight_of(product: ir.Node) -> FloatArray:
    """Return the ``(K, M)`` weight that a product reads, from its integers."""
    restore = product.inputs[1].producer() if product.inputs[1] is not None else None
    assert restore is not None  # noqa: S101  (quantize_weights has put it there; narrows the type)
    integers, scales = (array_of(value) for value in restore.inputs[:2])
    return np.asarray(integers.astype(np.float32) * scales.astype(np.float32)[None, :], np.float32)


def _pair(graph: ir.Graph, value: ir.Value, name: str, low: float, high: float) -> ir.Value:
    """Return a Q/DQ pair of uint16 behind a value."""
    scale = np.float32(max(high - low, 1e-30) / _TOP)
    constants = (
        add_constant(graph, f"{name}/scale", np.array(scale, np.float32)),
        add_constant(graph, f"{name}/zero_point", np.array(np.clip(round(-low / scale), 0, _TOP), np.uint16)),
    )
    quantize = ir.node("QuantizeLinear", [value, *constants], name=f"{name}/quantize")
    quantize.outputs[0].name = f"{name}/integers"
    restored = ir.node("DequantizeLinear", [quantize.outputs[0], *constants], name=f"{name}/dequantize")
    restored.outputs[0].name = f"{name}/restored"
    graph.extend([quantize, restored])
    return restored.outputs[0]
