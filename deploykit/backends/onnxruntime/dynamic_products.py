"""Matrix products whose input is quantized at each call, from the range that the call itself has.

``MatMul(x, W) -> Cast(MatMulInteger(q, Wq)) * (s * Ws)`` with ``q, s, z = DynamicQuantizeLinear(x)``:
standard ONNX operators, which ONNX Runtime fuses into one DynamicQuantizeMatMul.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from deploykit.calibration.plan import QuantizationPlan
from deploykit.calibration.quantize_weights import corrected_bias, drop_unread, replace_bias
from deploykit.onnx_values import add_constant, floats_of

DYNAMIC_OPERATORS = frozenset(("MatMul", "Gemm"))
"""A matrix product writes float to LayerNorm, GELU or softmax: between fixed ranges it does not become one kernel."""


def quantize_products(model: ir.Model, plan: QuantizationPlan) -> QuantizationPlan:
    """Quantize every planned MatMul and Gemm at each call, its weight as the plan has it.

    Those of another tool's plan have been quantized as the tool does it, with a range for all calls.
    """
    if plan.imported:
        return plan
    graph = model.graph
    nodes = {node.name: node for node in graph if node.op_type in DYNAMIC_OPERATORS}
    for name, use in plan.placement.weights.items():
        if name not in nodes:
            continue
        node, weight = nodes[name], graph.initializers[use.weight]
        values = floats_of(weight)
        bias = corrected_bias(graph, node, use, plan, values.shape[use.axis])
        if bias is not None:
            replace_bias(node, use, add_constant(graph, f"{name}/bias", bias))
        quantize_product(graph, node, *plan.integers_of(name, values, use.axis))
        drop_unread(graph, weight)
    return plan


def quantize_product(
    graph: ir.Graph, node: ir.Node, integers: npt.NDArray[np.int8], scales: npt.NDArray[np.float32]
) -> None:
    """Replace a MatMul or Gemm over a constant weight in place; what follows it stays.

    Args:
        graph: the graph that holds the node.
        node: the product; a Gemm's bias is added after it.
        integers: its weight ``(K, M)`` in -127..127, or ``(M, K)`` for a Gemm with transB.
        scales: ``(M,)``, of each output channel.
    """
    source, weight = node.inputs[0], node.inputs[1]
    assert source is not None and weight is not None  # noqa: S101  (ONNX requires both; narrows the types)
    if node.op_type == "Gemm" and node.attributes.get_int("transB", False):
        integers = np.ascontiguousarray(integers.T)
    name = node.name
    quantized = quantized_at_each_call(graph, source)
    constants = {
        part: add_constant(graph, f"{name}/{part}", array)
        for part, array in (("integers", integers), ("scale", scales), ("zero_point", np.zeros(len(scales), np.int8)))
    }
    product = ir.node(
        "MatMulInteger",
        [quantized[0], constants["integers"], quantized[2], constants["zero_point"]],
        name=f"{name}/product",
    )
    widened = ir.node("Cast", [product.outputs[0]], {"to": onnx.TensorProto.FLOAT}, name=f"{name}/float")
    step = ir.node("Mul", [quantized[1], constants["scale"]], name=f"{name}/step")
    scaled = ir.node("Mul", [widened.outputs[0], step.outputs[0]], name=f"{name}/scaled")
    added: list[ir.Node] = [product, widened, step, scaled]
    if node.op_type == "Gemm" and len(node.inputs) > 2:
        added.append(ir.node("Add", [scaled.outputs[0], node.inputs[2]], name=f"{name}/add"))
    ir.convenience.replace_nodes_and_values(graph, node, [node], added, node.outputs, added[-1].outputs)


def quantized_at_each_call(graph: ir.Graph, source: ir.Value) -> tuple[ir.Value, ...]:
    """Return the integers, scale and zero point of a tensor, quantized once for all products that read it."""
    for reader in source.consumers():
        if reader.op_type == "DynamicQuantizeLinear":
            return tuple(reader.outputs)
    node = ir.node("DynamicQuantizeLinear", [source], name=f"{source.name}/quantize", num_outputs=3)
    for value, part in zip(node.outputs, ("integers", "scale", "zero_point"), strict=True):
        value.name = f"{source.name}/{part}"
    graph.append(node)  # the renderer sorts the graph
    return tuple(node.outputs)
