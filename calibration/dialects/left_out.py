"""What a dialect leaves in float of what the plan has in integers, because its runtime is faster so.

Chosen by the kind of node alone, from times of each kind in float and in integers, so that equal
networks give equal engines on every machine.
"""

from __future__ import annotations

import math

import onnx
import onnx_ir as ir

from deploykit.calibration.placement import Placement, fused_activation
from deploykit.calibration.plan import QuantizationPlan

THIN_CHANNELS = 32
"""The most channels of a convolution that still counts to the image's side."""
_FOLLOWED = ("HardSwish", "Add", "Mul", "ReduceMean", "GlobalAveragePool")
_NARROW = "its integer kernel is slower than float on so few channels of so large a map"
_POINT = "it works on a 1x1 map, where this runtime gains nothing from integers"


def leave_out(
    model: onnx.ModelProto, plan: QuantizationPlan, *, image_side: bool, pointlike_weights: int | None
) -> QuantizationPlan:
    """A plan as a runtime gets it: without the nodes of the kinds that are to stay in float there.

    Args:
        model: the master graph.
        plan: the plan of all runtimes.
        image_side: leave out the stem, and the depthwise and projecting convolutions right behind it.
        pointlike_weights: leave out convolutions on 1x1 maps with fewer weights than this; None: all of them.
    """
    found = _pointlike(model, plan.placement, pointlike_weights)
    if image_side:
        found |= _image_side(model, plan.placement)
    return plan.without(model, found) if found else plan


def _pointlike(model: onnx.ModelProto, placement: Placement, fewest: int | None) -> dict[str, str]:
    sizes = {tensor.name: math.prod(tensor.dims) for tensor in model.graph.initializer}
    return {
        name: _POINT
        for name, use in placement.weights.items()
        if use.pointlike and (fewest is None or sizes[use.weight] < fewest)
    }


def _image_side(model: onnx.ModelProto, placement: Placement) -> dict[str, str]:
    """The convolutions at the image's side, each with the reason.

    A convolution of the image has 27 to 147 products a number and 3 channels, of which an integer kernel
    fills neither. What follows it on the largest map is bound by memory while it has few channels.
    """
    graph = ir.from_proto(model).graph
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
    """Whether a convolution of few channels is depthwise, or 1x1 and no wider than what it reads."""
    shape = node.inputs[1].shape  # type: ignore[union-attr]
    assert shape is not None  # noqa: S101  (an initializer has a shape; narrows the type)
    outputs, width, *kernel = (int(size) for size in shape)  # type: ignore[arg-type]
    groups = node.attributes.get_int("group", 1)
    if width * groups > THIN_CHANNELS or outputs > width * groups:
        return False
    return width == 1 or (groups == 1 and kernel == [1, 1])
