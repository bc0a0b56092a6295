"""Channel counts at which ONNX Runtime's integer convolutions run at full speed, by zeros that change no number.

``Conv(group=g) -> Conv(group=g/k)`` with zeros between k groups: its integer kernel makes a matrix product a
group, and 16 channels are too few for one. Depthwise convolutions get channels to a multiple of 16: what is
left over runs channel by channel.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from deploykit.arrays import Array
from deploykit.calibration.placement import is_pooled
from deploykit.calibration.plan import QuantizationPlan
from deploykit.calibration.rounded_weight import RoundedWeight
from deploykit.onnx_values import array_of, sizes_of_constant, tensor_of

GROUP_CHANNELS = 64
"""The fewest channels of a group: RegNetY-008's groups of 16 took 0.4 to 1.3 ms a layer, joined 0.2 to 0.5."""
LANES = 16
"""The channels that a depthwise kernel works on at a time: MobileNetV3's 5x5 layers of 120 took 0.85 ms, of 128 0.4."""
_FOLLOWS = ("Relu", "Clip", "HardSwish", "Sigmoid", "HardSigmoid", "Mul", "Add")

Scalar = TypeVar("Scalar", bound=np.generic)


def pad_channels(model: ir.Model, plan: QuantizationPlan) -> QuantizationPlan:
    """Give a graph, and its plan, wider groups and padded depthwise convolutions.

    Only nodes that run in integers change. Ranges and names stay: whatever reads a padded channel has zeros for it.
    """
    weights = plan.placement.weights
    shifts, rounded = dict(plan.bias_shift), dict(plan.weights)
    convolutions = [node for node in model.graph if node.op_type == "Conv" and node.name in weights]
    for node in convolutions:
        if _is_depthwise(node) and _channels(node) % LANES:
            group = _ChannelGroup(node)
            if group.can_be_padded(weights):
                group.pad(-_channels(node) % LANES, shifts, rounded)
        elif _groups(node) > 1 and not _is_depthwise(node):
            _join_groups(node, rounded)
    return replace(plan, bias_shift=shifts, weights=rounded)


def _join_groups(node: ir.Node, rounded: dict[str, RoundedWeight]) -> None:
    weight, groups = node.inputs[1], _groups(node)
    values = array_of(weight)
    width = values.shape[1]
    joined = next((k for k in range(1, groups + 1) if groups % k == 0 and k * width >= GROUP_CHANNELS), groups)
    if joined == 1 or weight is None or len(list(weight.uses())) > 1:
        return
    _write(weight, _side_by_side(values, groups, joined))
    if (chosen := rounded.get(str(node.name))) is not None:
        rounded[str(node.name)] = replace(chosen, steps=_side_by_side(chosen.steps, groups, joined))
    node.attributes["group"] = ir.AttrInt64("group", groups // joined)


def _side_by_side(values: npt.NDArray[Scalar], groups: int, joined: int) -> npt.NDArray[Scalar]:
    """Return a weight ``(channels, width, ...)`` of groups as that of wider ones, with zeros between those joined."""
    outputs, width = values.shape[0] // groups, values.shape[1]
    wide = np.zeros((values.shape[0], width * joined, *values.shape[2:]), values.dtype)
    for group in range(groups):
        rows = slice(group * outputs, (group + 1) * outputs)
        place = group % joined
        wide[rows, place * width : (place + 1) * width] = values[rows]
    return wide


class _ChannelGroup:
    """The channels of a depthwise convolution, through all that keeps them apart, to the layers that mix them."""

    def __init__(self, depthwise: ir.Node) -> None:
        self.channels = _channels(depthwise)
        self.writers: dict[ir.Node, None] = {}
        self.readers: dict[ir.Node, None] = {}
        self.depthwise: dict[ir.Node, None] = {}
        self.blocked = False
        self._values: set[ir.Value] = set()
        self._visit(depthwise.outputs[0])
        self._visit(depthwise.inputs[0])

    def can_be_padded(self, integers: Collection[str]) -> bool:
        """Return whether nothing but integer convolutions with weights of their own reads and writes the channels."""
        nodes = (*self.writers, *self.readers, *self.depthwise)
        alone = all(len(list(value.uses())) == 1 for node in nodes for value in node.inputs[1:] if value is not None)
        return not self.blocked and alone and all(str(node.name) in integers for node in nodes)

    def pad(self, count: int, shifts: dict[str, npt.NDArray[np.float32]], rounded: dict[str, RoundedWeight]) -> None:
        """Give every tensor of the group ``count`` channels of zeros more."""
        for node in (*self.writers, *self.depthwise):
            for value in node.inputs[1:]:
                _write(value, _padded(array_of(value), count, axis=0))
            if (shift := shifts.get(str(node.name))) is not None:
                shifts[str(node.name)] = np.pad(shift, (0, count))
            if (chosen := rounded.get(str(node.name))) is not None:
                scales = np.pad(chosen.scales, (0, count), mode="edge")  # zeros are zeros in any scale
                rounded[str(node.name)] = replace(chosen, steps=_padded(chosen.steps, count, axis=0), scales=scales)
        for node in self.depthwise:
            node.attributes["group"] = ir.AttrInt64("group", self.channels + count)
        for node in self.readers:
            _write(node.inputs[1], _padded(array_of(node.inputs[1]), count, axis=1))
            if (chosen := rounded.get(str(node.name))) is not None:
                rounded[str(node.name)] = replace(chosen, steps=_padded(chosen.steps, count, axis=1))

    def _visit(self, value: ir.Value | None) -> None:
        if value is None or value in self._values or self.blocked:
            return
        self._values.add(value)
        if value.is_graph_output() or value.producer() is None:
            self.blocked = True
            return
        self._visit_node(value.producer(), written=True)
        for node in value.consumers():
            self._visit_node(node, written=False)

    def _visit_node(self, node: ir.Node | None, *, written: bool) -> None:
        assert node is not None  # noqa: S101  (checked by the caller; narrows the type)
        if node.op_type == "Conv" and _is_depthwise(node):
            self.depthwise[node] = None
            self._visit(node.inputs[0])
            self._visit(node.outputs[0])
        elif node.op_type == "Conv" and _groups(node) == 1:
            (self.writers if written else self.readers)[node] = None
        elif is_pooled(node):
            self._visit(node.inputs[0])
            self._visit(node.outputs[0])
        elif node.op_type in _FOLLOWS:
            for value in (*node.inputs, *node.outputs):
                if value is not None and not (value.is_initializer() and tensor_of(value).size == 1):
                    self._visit(value)
        else:
            self.blocked = True


def _is_depthwise(node: ir.Node) -> bool:
    return 1 < _groups(node) == _channels(node) and sizes_of_constant(node.inputs[1])[1] == 1


def _groups(node: ir.Node) -> int:
    return node.attributes.get_int("group", 1)


def _channels(node: ir.Node) -> int:
    return sizes_of_constant(node.inputs[1])[0]


def _padded(array: npt.NDArray[Scalar], count: int, axis: int) -> npt.NDArray[Scalar]:
    return np.pad(array, [(0, count if place == axis else 0) for place in range(array.ndim)])


def _write(value: ir.Value | None, array: Array) -> None:
    assert value is not None  # noqa: S101  (of a planned node; narrows the type)
    value.const_value = ir.tensor(array, name=value.name)
    value.shape = ir.Shape(array.shape)
