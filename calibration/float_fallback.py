"""Keep planned INT8 nodes in float where a runtime is faster that way.

Chosen by the kind of node alone, from times of each kind in float and in integers, so that equal
networks give equal engines on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import onnx_ir as ir

from deploykit.calibration.placement import fused_activation
from deploykit.calibration.plan import QuantizationPlan
from deploykit.onnx_values import array_of, sizes_of_constant

THIN_CHANNELS = 32
"""The most channels of a convolution that still counts to the image's side."""
_FOLLOWED = ("HardSwish", "Add", "Mul", "ReduceMean", "GlobalAveragePool")
_NARROW = "its integer kernel is slower than float on so few channels of so large a map"
_POINT = "it works on a 1x1 map, where this runtime gains nothing from integers"


def keep_pointlike(*, fewest_weights: int | None = None) -> Callable[[ir.Model, QuantizationPlan], Mapping[str, str]]:
    """Make the choice of convolutions on 1x1 maps with fewer weights than this; None: all of them."""

    def choose(model: ir.Model, plan: QuantizationPlan) -> Mapping[str, str]:
        sizes = {name: math.prod(array_of(value).shape) for name, value in model.graph.initializers.items()}
        return {
            name: _POINT
            for name, use in plan.placement.weights.items()
            if use.pointlike and (fewest_weights is None or sizes[use.weight] < fewest_weights)
        }

    return choose


def keep_image_side(model: ir.Model, plan: QuantizationPlan) -> Mapping[str, str]:
    """Choose the stem, and the depthwise and projecting convolutions right behind it, each with the reason.

    A convolution of the image has 27 to 147 products a number and 3 channels, of which an integer kernel
    fills neither. What follows it on the largest map is bound by memory while it has few channels.
    """
    graph, placement = model.graph, plan.placement
    found: dict[str, str] = {}
    reached = set(graph.inputs)
    for node in graph:
        if node.inputs and node.inputs[0] in reached and node.op_type in _FOLLOWED:
            reached.update(node.outputs)
        if node.op_type != "Conv" or node.name not in placement.weights or node.inputs[0] not in reached:
            continue
        inside = placement.weights[str(node.name)].pointlike or node.inputs[0] in graph.inputs
        if not inside and not _is_thin(node):
            continue
        activation = fused_activation(node.outputs[0])
        written = node.outputs[0] if activation is None else activation.outputs[0]
        if any(reader.op_type == "MaxPool" for reader in written.consumers()):
            continue  # pooled in integers, it is a residual add's operand too
        found[str(node.name)] = _NARROW
        reached |= {node.outputs[0], written}
    return found


def _is_thin(node: ir.Node) -> bool:
    """Return whether a convolution of few channels is depthwise, or 1x1 and no wider than what it reads."""
    outputs, width, *kernel = sizes_of_constant(node.inputs[1])
    groups = node.attributes.get_int("group", 1)
    if width * groups > THIN_CHANNELS or outputs > width * groups:
        return False
    return width == 1 or (groups == 1 and kernel == [1, 1])
