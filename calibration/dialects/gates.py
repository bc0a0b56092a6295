"""Gated maps between integer kernels: a gate lies between 0 and 1 by itself and needs no measured range.

``HardSwish(x) -> x * h`` with ``h = clip(x + 3, 0, 6) / 6``: in uint8 with zero point 0 the rounding of
``x + 3`` at scale 6/255 is the clip, and reading it back at scale 1/255 is the division.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from deploykit.calibration.placement import is_gate
from deploykit.calibration.plan import add_constant

_GATE_SCALE = 1 / 255


def prepare(graph: ir.Graph, value: ir.Value) -> ir.Value:
    """Write what stands between integer kernels in operators that have integer kernels, all but its own Q/DQ pair.

    Args:
        graph: the graph being rewritten.
        value: what a HardSwish, a product with a sigmoid or a global average pool gives.

    Returns:
        The value that takes its place, of the same name.
    """
    node = value.producer()
    assert node is not None  # noqa: S101  (a gated value is no input of the graph; narrows the type)
    if node.op_type == "HardSwish":
        return _split_hard_swish(graph, node)
    if node.op_type == "ReduceMean":
        return _replace(graph, node, ir.node("GlobalAveragePool", [node.inputs[0]], name=f"{node.name}/pool"))
    if node.op_type == "GlobalAveragePool":
        return value
    for position, factor in enumerate(node.inputs):
        if factor is not None and is_gate(factor):
            node.replace_input_with(position, _pair(graph, factor, f"{node.name}/gate", _GATE_SCALE))
    return value


def _split_hard_swish(graph: ir.Graph, node: ir.Node) -> ir.Value:
    source, name = node.inputs[0], str(node.name)
    three = _constant(graph, f"{name}/three", np.array(255, np.uint8), 3 / 255)
    shifted = ir.node("Add", [source, three], name=f"{name}/shifted")
    gate = _pair(graph, shifted.outputs[0], f"{name}/gate", 6 / 255, _GATE_SCALE)
    graph.append(shifted)
    return _replace(graph, node, ir.node("Mul", [source, gate], name=f"{name}/product"))


def _replace(graph: ir.Graph, node: ir.Node, other: ir.Node) -> ir.Value:
    ir.convenience.replace_nodes_and_values(graph, node, [node], [other], node.outputs, other.outputs)
    return other.outputs[0]


def _pair(graph: ir.Graph, value: ir.Value, name: str, scale: float, read_as: float | None = None) -> ir.Value:
    """A Q/DQ pair of unsigned integers behind a value; ``read_as`` is the scale to restore with."""
    zero = add_constant(graph, f"{name}/zero_point", np.array(0, np.uint8))
    written = add_constant(graph, f"{name}/scale", np.array(scale, np.float32))
    read = written if read_as is None else add_constant(graph, f"{name}/read_as", np.array(read_as, np.float32))
    quantize = ir.node("QuantizeLinear", [value, written, zero], name=f"{name}/quantize")
    quantize.outputs[0].name = f"{name}/integers"
    restored = ir.node("DequantizeLinear", [quantize.outputs[0], read, zero], name=f"{name}/dequantize")
    restored.outputs[0].name = f"{name}/restored"
    graph.extend([quantize, restored])
    return restored.outputs[0]


def _constant(graph: ir.Graph, name: str, integers: np.ndarray, scale: float) -> ir.Value:
    parts = [
        add_constant(graph, f"{name}/integers", integers),
        add_constant(graph, f"{name}/scale", np.array(scale, np.float32)),
        add_constant(graph, f"{name}/zero_point", np.array(0, np.uint8)),
    ]
    node = ir.node("DequantizeLinear", parts, name=f"{name}/dequantize")
    node.outputs[0].name = f"{name}/restored"
    graph.append(node)
    return node.outputs[0]
