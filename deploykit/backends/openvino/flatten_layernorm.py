"""LayerNormalization of (N, H, W, C) -> Reshape(LayerNormalization(Reshape(x))) of (N, H * W, C), in ONNX graphs.

OpenVINO normalizes the last of three axes by one operator, MVN, and the last of four by a mean, a difference and
a root mean square.
"""

from __future__ import annotations

import math

import onnx_ir as ir

from deploykit.fusion.data_movement import sizes
from deploykit.fusion.graph_writer import GraphWriter


def flatten_layernorm(model: ir.Model) -> int:
    """Let each LayerNorm over channels-last maps see tokens, in place.

    Exact; the reshapes move nothing. Left alone: half precision, norms over several axes, norms whose
    result is quantized, and sizes that are not static but for the batch.

    Returns:
        How many norms were rewritten.
    """
    return sum(_flatten(model, node) for node in list(model.graph) if node.op_type == "LayerNormalization")


def _flatten(model: ir.Model, norm: ir.Node) -> bool:
    maps, result = norm.inputs[0], norm.outputs[0]
    shape = maps.shape if maps is not None else None
    if shape is None or maps is None or len(shape) < 4 or maps.dtype != ir.DataType.FLOAT or len(norm.outputs) > 1:
        return False
    sides = tuple(side for side in shape[1:] if isinstance(side, int))
    last = norm.attributes.get_int("axis", -1) in (-1, len(shape) - 1)
    quantized = any(node.op_type == "QuantizeLinear" for node, _ in result.uses())
    if len(sides) < len(shape) - 1 or not last or quantized or result.is_graph_output():
        return False
    graph = GraphWriter(model=model, before=norm, name=f"{result.name}_norm")
    tokens = graph.shaped(maps, (math.prod(sides[:-1]), sides[-1]), "tokens")
    settings = {"axis": -1, "epsilon": norm.attributes.get_float("epsilon", 1e-5)}
    normed = graph.node("LayerNormalization", [tokens, *norm.inputs[1:]], sizes(tokens), "normed", settings)
    ir.convenience.replace_all_uses_with(result, graph.shaped(normed, sides, "maps"))
    model.graph.remove(norm, safe=True)
    return True
