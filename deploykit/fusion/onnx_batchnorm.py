"""BatchNorm(x; g, b, m, v) -> Conv(x; g / sqrt(v + eps), b - m * g / sqrt(v + eps)), depthwise 1x1, in ONNX graphs.

What is left of a GroupNorm's affine part stands alone in ONNX Runtime, in plain layout. As a convolution it takes the
residual and the activation behind it along, in the blocked layout of the convolutions around.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from deploykit.fusion.graph_writer import GraphWriter
from deploykit.fusion.moves import constant


def convolve_batchnorm(model: ir.Model) -> int:
    """Write each BatchNorm over maps that no convolution took as a depthwise convolution, in place.

    Exact in real arithmetic. Left alone: half precision, training, and maps of another rank.

    Returns:
        How many norms were written.
    """
    written = sum(_convolve(model, node) for node in list(model.graph) if node.op_type == "BatchNormalization")
    if written:
        common.RemoveUnusedNodesPass()(model)
    return written


def _convolve(model: ir.Model, norm: ir.Node) -> bool:
    maps, result = norm.inputs[0], norm.outputs[0]
    numbers = [constant(value) for value in norm.inputs[1:]]
    shape = maps.shape if maps is not None else None
    if maps is None or shape is None or len(shape) != 4 or maps.dtype != ir.DataType.FLOAT or len(norm.outputs) > 1:
        return False
    known = [values.astype(np.double) for values in numbers if values is not None]
    if len(known) < 4 or norm.attributes.get_int("training_mode", 0) or result.is_graph_output():
        return False
    weight, bias, mean, variance = known
    scale = weight / np.sqrt(variance + norm.attributes.get_float("epsilon", 1e-5))
    graph = GraphWriter(model=model, before=norm, name=f"{result.name}_depthwise")
    kernel = graph.constant(scale.astype(np.float32).reshape(-1, 1, 1, 1), "weight")
    shift = graph.constant((bias - mean * scale).astype(np.float32), "bias")
    layer = graph.node("Conv", [maps, kernel, shift], tuple(shape[1:]), "conv", {"group": scale.size})  # type: ignore[arg-type]
    ir.convenience.replace_all_uses_with(result, layer)
    return True
