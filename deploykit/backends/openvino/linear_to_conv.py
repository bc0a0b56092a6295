"""Linear layers of tokens between Q/DQ nodes as 1x1 convolutions, whose integer kernels are OpenVINO's faster ones.

``x @ W + b -> Conv1x1(x^T, W^T, b)^T`` on a map of one row with the channels second: OpenVINO keeps such maps with
the channels last in memory, so that neither transposition moves a byte. ViT-S/16 took 0.79 of the time; the
windows of Swin and the maps of ConvNeXt, written so, two to three times theirs.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from deploykit.calibration.plan import QuantizationPlan
from deploykit.onnx_values import add_constant, array_of


def linear_to_conv(model: ir.Model, plan: QuantizationPlan) -> QuantizationPlan:
    """Rewrite every MatMul over a dequantized weight ``(K, M)`` and tokens ``(N, T, K)``.

    ``N`` is the graph's batch: windows, of which an image has many, stay, and so do maps and the head's single row.
    """
    graph = model.graph
    images = graph.inputs[0].shape
    for node in [node for node in graph if node.op_type == "MatMul"]:
        source, weight = (_dequantized(value) for value in node.inputs)
        shape = node.outputs[0].shape
        if source is None or weight is None or shape is None or len(shape) != 3 or images is None:
            continue
        if shape[0] != images[0]:
            continue
        integers = weight.inputs[0]
        if integers is None or integers.const_value is None:
            continue
        _rewrite(graph, node, source, weight)
    return plan


def _rewrite(graph: ir.Graph, node: ir.Node, source: ir.Node, weight: ir.Node) -> None:
    name = str(node.name)
    axis = add_constant(graph, f"{name}/axis", np.array([2]))
    moved = ir.node("Transpose", [source.inputs[0]], {"perm": [0, 2, 1]}, name=f"{name}/in")
    row = ir.node("Unsqueeze", [moved.outputs[0], axis], name=f"{name}/row")
    restored = ir.node("DequantizeLinear", [row.outputs[0], *source.inputs[1:]], name=f"{name}/restored")
    kernel, bias, last = _kernel(graph, name, weight), *_bias(node)
    operands = [restored.outputs[0], kernel.outputs[0], *((bias,) if bias is not None else ())]
    product = ir.node("Conv", operands, {"kernel_shape": [1, 1]}, name=name)
    tokens = ir.node("Squeeze", [product.outputs[0], axis], name=f"{name}/tokens")
    moved_back = ir.node("Transpose", [tokens.outputs[0]], {"perm": [0, 2, 1]}, name=f"{name}/out")
    added = [moved, row, restored, kernel, product, tokens, moved_back]
    removed = [node] if last is node else [last, node]
    ir.convenience.replace_nodes_and_values(graph, node, removed, added, last.outputs, moved_back.outputs)


def _kernel(graph: ir.Graph, name: str, weight: ir.Node) -> ir.Node:
    """Return the dequantized ``(M, K, 1, 1)`` kernel of a weight ``(K, M)`` with a scale a column."""
    integers = array_of(weight.inputs[0])
    kernel = add_constant(graph, f"{name}/kernel", np.ascontiguousarray(integers.T)[..., None, None])
    return ir.node("DequantizeLinear", [kernel, *weight.inputs[1:]], {"axis": 0}, name=f"{name}/kernel/dequantize")


def _bias(node: ir.Node) -> tuple[ir.Value | None, ir.Node]:
    """Return the constant vector that alone is added to a product, and the last node of the two."""
    uses = list(node.outputs[0].uses())
    if len(uses) == 1 and uses[0].node.op_type == "Add" and not node.outputs[0].is_graph_output():
        for operand in uses[0].node.inputs:
            if operand is not None and operand.const_value is not None and len(operand.const_value.shape) == 1:
                return operand, uses[0].node
    return None, node


def _dequantized(value: ir.Value | None) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == "DequantizeLinear" else None
