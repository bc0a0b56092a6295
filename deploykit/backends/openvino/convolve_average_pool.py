"""AveragePool(pad(x), count_include_pad=1) -> depthwise Conv(pad(x), 1 / window), where x is made of integers.

OpenVINO 2026.4.1 pools the integers and restores the floats behind the pool. What it pads with is then the integer 0,
which stands for 0 only where the zero point is 0. A convolution whose weights are floats reads floats.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from deploykit.calibration.plan import QuantizationPlan
from deploykit.fusion.data_movement import constant, is_static, sizes
from deploykit.onnx_values import add_constant

_MOVES = (
    *("Concat", "Flatten", "Gather", "Identity", "MaxPool", "Pad", "Relu", "Reshape"),
    *("Resize", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"),
)
"""What OpenVINO may compute in integers between a rounding and a pooling."""
_SETTINGS = ("kernel_shape", "strides", "dilations", "pads")


def convolve_average_pool(model: ir.Model, plan: QuantizationPlan) -> QuantizationPlan:
    """Write every padded pooling of integers with another zero point than 0 as a convolution, in place."""
    for pool in [node for node in model.graph if node.op_type == "AveragePool"]:
        if _is_padded(pool) and _has_zero_point(pool.inputs[0]):
            _rewrite(model.graph, pool)
    return plan


def _is_padded(pool: ir.Node) -> bool:
    """Return whether zeros around the map count in every window, by the pooling's own padding or by a Pad before it."""
    source, attributes = pool.inputs[0], pool.attributes
    if source is None or attributes.get_string("auto_pad", "NOTSET") != "NOTSET":
        return False
    if attributes.get_int("ceil_mode", 0) and not is_static(pool.outputs[0]):
        return False  # a window that hangs over the map has another divisor
    if any(attributes.get_ints("pads", ())):
        return bool(attributes.get_int("count_include_pad", 0))
    before = source.producer()
    return before is not None and before.op_type == "Pad"


def _has_zero_point(value: ir.Value | None) -> bool:
    """Return whether integers whose zero point is not 0 reach a value by moves alone."""
    node = value.producer() if value is not None else None
    if node is None:
        return False
    if node.op_type == "DequantizeLinear":
        zero_point = constant(node.inputs[2]) if len(node.inputs) > 2 else None
        return zero_point is not None and bool(np.any(zero_point))
    return node.op_type in _MOVES and any(map(_has_zero_point, node.inputs))


def _rewrite(graph: ir.Graph, pool: ir.Node) -> None:
    kernel = pool.attributes.get_ints("kernel_shape", ())
    channels, *_ = sizes(pool.outputs[0])
    window = np.full((channels, 1, *kernel), 1 / math.prod(kernel), np.float32)
    operands = [pool.inputs[0], add_constant(graph, f"{pool.name}/window", window)]
    settings = {name: pool.attributes.get_ints(name) for name in _SETTINGS if name in pool.attributes}
    mean = ir.node("Conv", operands, {**settings, "group": channels}, name=pool.name)
    ir.convenience.replace_nodes_and_values(graph, pool, [pool], [mean], pool.outputs, mean.outputs)
