"""Gemm(DequantizeLinear(q), DequantizeLinear(W), b) -> Cast(MatMulInteger(q, W)) * (s * Ws) + b.

ONNX Runtime makes an integer kernel of a Gemm, or of a MatMul and an Add of a bias, only when its output is quantized
too; otherwise its weight is dequantized again at each call, which takes longer than the product.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from deploykit.calibration.plan import QuantizationPlan
from deploykit.onnx_values import add_constant, array_of, floats_of


def split_gemms(model: ir.Model, plan: QuantizationPlan) -> QuantizationPlan:
    """Write every Gemm, and MatMul of matrices, in a fixed range as a product of integers, in place.

    It comes behind the activations. Only another tool's plan has fixed ranges there: others quantize at each call.
    """
    if plan.imported:
        for node in [each for each in model.graph if each.name in plan.placement.weights]:
            if node.op_type == "Gemm":
                _multiply_integers(model.graph, split_gemm(model.graph, node))
            elif node.op_type == "MatMul" and len(node.outputs[0].shape or ()) == 2:
                _multiply_integers(model.graph, node)
    return plan


def _multiply_integers(graph: ir.Graph, product: ir.Node) -> None:
    """Write MatMul(DequantizeLinear(q), DequantizeLinear(W)) as a product of integers, in place; leave any other."""
    read, restore = (value.producer() if value is not None else None for value in product.inputs[:2])
    if product.op_type != "MatMul" or read is None or restore is None or read.op_type != "DequantizeLinear":
        return
    name, step = str(product.name), floats_of(read.inputs[1]) * floats_of(restore.inputs[1])
    integers = [read.inputs[0], restore.inputs[0], read.inputs[2], restore.inputs[2]]
    multiplied = ir.node("MatMulInteger", integers, name=f"{name}/integers")
    widened = ir.node("Cast", [multiplied.outputs[0]], {"to": ir.DataType.FLOAT.value}, name=f"{name}/float")
    factor = add_constant(graph, f"{name}/step", np.asarray(step, np.float32))
    scaled = ir.node("Mul", [widened.outputs[0], factor], name=f"{name}/scaled")
    added = [multiplied, widened, scaled]
    ir.convenience.replace_nodes_and_values(graph, product, [product], added, product.outputs, scaled.outputs)


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
