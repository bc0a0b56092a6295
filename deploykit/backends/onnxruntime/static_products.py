"""Gemm(x, DequantizeLinear(W), b) -> MatMul(x, DequantizeLinear(W)) + b.

ONNX Runtime makes an integer kernel of a MatMul whose output stays in float. A Gemm becomes one only when its output is
quantized too; otherwise its weight is dequantized again at each call, which takes longer than the product.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from deploykit.calibration.plan import QuantizationPlan
from deploykit.onnx_values import add_constant, array_of


def split_gemms(model: ir.Model, plan: QuantizationPlan) -> QuantizationPlan:
    """Write every Gemm over integer weights with fixed ranges as a MatMul and an Add, in place.

    Only another tool's plan has them: others quantize what a Gemm reads at each call.
    """
    if plan.imported:
        for node in list(model.graph):
            if node.op_type == "Gemm" and node.name in plan.placement.weights:
                split_gemm(model.graph, node)
    return plan


def split_gemm(graph: ir.Graph, gemm: ir.Node) -> ir.Node:
    """Write a Gemm over integer weights as a MatMul and an Add, in place; return the node that multiplies.

    One with other factors than 1, or over float weights, stays.
    """
    source, weight = gemm.inputs[0], gemm.inputs[1]
    restore = weight.producer() if weight is not None else None
    plain = all(gemm.attributes.get_float(name, 1.0) == 1.0 for name in ("alpha", "beta"))
    plain = plain and not gemm.attributes.get_int("transA", False)
    if restore is None or restore.op_type != "DequantizeLinear" or not plain:
        return gemm
    if gemm.attributes.get_int("transB", False):
        integers = restore.inputs[0]
        assert integers is not None  # noqa: S101  (an operand that the operator requires; narrows the type)
        turned = add_constant(
            graph, f"{integers.name}/transposed", np.ascontiguousarray(np.transpose(array_of(integers)))
        )
        restore.replace_input_with(0, turned)
        restore.attributes["axis"] = ir.AttrInt64("axis", 1)
        if not integers.uses():
            del graph.initializers[str(integers.name)]
    added = [ir.node("MatMul", [source, weight], name=f"{gemm.name}/product")]
    if len(gemm.inputs) > 2 and gemm.inputs[2] is not None:
        added.append(ir.node("Add", [added[0].outputs[0], gemm.inputs[2]], name=f"{gemm.name}/add"))
    ir.convenience.replace_nodes_and_values(graph, gemm, [gemm], added, gemm.outputs, added[-1].outputs)
    return added[0]
