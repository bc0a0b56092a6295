"""Which channels of a network scale together: what writes them, what reads them, what stands between.

A group is a set of tensors connected by operators that commute with a positive factor a channel: ReLU,
pooling, residual additions, products with an unscaled map, and moves of elements. A convolution, a
linear layer or a norm writes a group (a BatchNorm where none before or behind it could take it in, as
before the convolutions of a pre-activated block); convolutions and linear layers read it. A group that
anything else touches (GELU, softmax, a norm that reads it) cannot be scaled and is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch.fx import GraphModule, Node

from deploykit.fusion.affine import LINEAR, PERMUTATIONS, channel_axis, permutation
from deploykit.fusion.constants import argument, constant, operand, sizes

_aten = torch.ops.aten
_CONVOLUTIONS = (_aten.conv2d.default, _aten.conv2d.padding)
NORM_GAINS: dict[object, int] = {
    _aten.layer_norm.default: 2,
    _aten.group_norm.default: 2,
    _aten.batch_norm.default: 1,
}
"""Where each norm's gain is among its arguments; its shift comes behind it."""
_HOMOGENEOUS = (
    _aten.relu.default,
    _aten.relu_.default,
    _aten.leaky_relu.default,
    _aten.max_pool2d.default,
    _aten.avg_pool2d.default,
    _aten.adaptive_avg_pool2d.default,
    _aten.alias.default,
    _aten.clone.default,
    _aten.contiguous.default,
)
_CLIPS: dict[object, tuple[str, str] | None] = {
    **dict.fromkeys((_aten.hardtanh.default, _aten.hardtanh_.default), ("min_val", "max_val")),
    _aten.clamp.default: ("min", "max"),
    _aten.relu6.default: None,
}
"""Calls that clip, and what they call their bounds; None: they are 0 and 6."""
_RESHAPES = (_aten.reshape.default, _aten.view.default, _aten.flatten.using_ints, _aten.unsqueeze.default)
_ADDS = (_aten.add.Tensor, _aten.add_.Tensor)
_PRODUCTS = (_aten.mul.Tensor, _aten.mul_.Tensor)


@dataclass(kw_only=True, eq=False)
class ChannelGroup:
    """Channels that take one factor each.

    ``writers`` give them, by weight and bias; ``shifts`` are constants added to them, with their
    channel axis; ``readers`` are layers whose weights take them in; ``sources`` are the tensors that
    readers and additions read, which integer kernels have a range for, and ``outputs`` those that the
    graph gives, with their channel axis. ``clips`` are convolutions of the images with a ReLU6 or its like
    behind them, and its bound; of several the least.
    """

    channels: int
    writers: list[Node] = field(default_factory=list)
    shifts: list[tuple[Node, int]] = field(default_factory=list)
    readers: list[Node] = field(default_factory=list)
    sources: dict[Node, int] = field(default_factory=dict)
    outputs: list[tuple[Node, int]] = field(default_factory=list)
    clips: dict[Node, float] = field(default_factory=dict)
    blocked: bool = False


def channel_groups(module: GraphModule) -> list[ChannelGroup]:
    """Return every group of a flat inference graph that can be scaled and that a layer reads, in the graph's order."""
    finder = _Finder(module)
    for node in module.graph.nodes:
        finder.visit(node)
    groups = dict.fromkeys(group for group, _ in finder.members.values())
    return [group for group in groups if group.readers and group.writers and not group.blocked]


class _Finder:
    """One walk over a graph; ``members`` maps a tensor to its group and the axis of its channels."""

    def __init__(self, module: GraphModule) -> None:
        self.module = module
        self.members: dict[Node, tuple[ChannelGroup, int]] = {}
        self.weights: dict[tuple[str, str], ChannelGroup] = {}

    def visit(self, node: Node) -> None:
        if node.op == "output":
            for value in dict.fromkeys(node.all_input_nodes):
                if value in self.members:
                    group, axis = self.members[value]
                    group.outputs.append((value, axis))
        elif node.op == "call_function":
            kept = self._kept_axis(node)
            if self._is_layer(node):
                self._layer(node)
            elif node.target in NORM_GAINS:
                self._norm(node)
            elif kept is None or not self._follow(node, kept):
                self._block(node)

    def _is_layer(self, node: Node) -> bool:
        return node.target in (LINEAR, *_CONVOLUTIONS) and constant(self.module, node.args[1]) is not None

    def _norm(self, node: Node) -> None:
        """Begin a group behind a norm whose gain and shift are constants, or that has none, one a channel."""
        self._block(node)
        position = NORM_GAINS[node.target]
        gain, shift = (argument(node, position + step, name, None) for step, name in enumerate(("weight", "bias")))
        tokens = node.target == _aten.layer_norm.default
        one_axis = not tokens or len(argument(node, 1, "normalized_shape", ())) == 1
        if one_axis and all(each is None or constant(self.module, each) is not None for each in (gain, shift)):
            self._write(node, len(sizes(node)) - 1 if tokens else 1, gain)

    def _layer(self, node: Node) -> None:
        source = operand(node, 0)
        axis = channel_axis(node)  # of what it reads too, whose rank is the same
        if source in self.members:
            group, source_axis = self.members[source]
            if source_axis != axis:
                group.blocked = True
            else:
                group.readers.append(node)
                group.sources[source] = source_axis
                self._share(node.args[1], "read", group)
        self._write(node, axis, node.args[1])

    def _write(self, node: Node, axis: int, weight: object) -> None:
        group = ChannelGroup(channels=sizes(node)[axis], writers=[node])
        self.members[node] = (group, axis)
        self._share(weight, "written", group)

    def _share(self, weight: object, role: str, group: ChannelGroup) -> None:
        """Join the groups of nodes that share a weight."""
        if isinstance(weight, Node):
            other = self.weights.setdefault((str(weight.target), role), group)
            self._join(other, group)

    def _follow(self, node: Node, axis: int) -> bool:
        """Let a node's output join the group of its inputs; False where they have none in common."""
        inputs = [value for value in node.all_input_nodes if value in self.members]
        if node.target in _PRODUCTS and sum(value in self.members for value in node.args) != 1:
            return False
        if node.target in (*_ADDS, _aten.cat.default) and not self._adds_alike(node, axis):
            return False
        group = self.members[inputs[0]][0]
        for value in inputs[1:]:
            if self.members[value][0].channels != group.channels:
                return False
            self._join(group, self.members[value][0])
            group = self.members[value][0]
        self.members[node] = (group, axis)
        if node.target in _CLIPS and math.isfinite(bound := _bounds(node)[1]):
            conv = operand(node, 0)
            group.clips[conv] = min(bound, group.clips.get(conv, bound))
        return True

    def _adds_alike(self, node: Node, axis: int) -> bool:
        """Return whether every operand of a sum or concatenation is scaled too: it is in a group, or a constant."""
        operands = list(node.all_input_nodes)
        if any(not isinstance(value, Node) for value in node.args[:2]) and node.target in _ADDS:
            return False
        shifts = []
        for value in operands:
            if value in self.members:
                if self.members[value][1] != axis or len(sizes(value)) != len(sizes(node)):
                    return False
                continue
            shift = constant(self.module, value)
            position = axis - (len(sizes(node)) - shift.dim()) if shift is not None else -1
            if shift is None or position < 0 or shift.shape[position] != sizes(node)[axis]:
                return False
            shifts.append((value, position))
        if node.target in _ADDS:
            for value in operands:
                if value in self.members:
                    self.members[value][0].sources[value] = axis
        for value, position in shifts:
            group = next(self.members[value][0] for value in operands if value in self.members)
            group.shifts.append((value, position))
            self._share(value, "written", group)
        return True

    def _kept_axis(self, node: Node) -> int | None:
        """Return where an operator that commutes with a factor a channel leaves the channels; None for any other."""
        source = next((value for value in node.all_input_nodes if value in self.members), None)
        follow = FOLLOWS.get(node.target)
        if source is None or follow is None:
            return None
        return follow(node, sizes(source), self.members[source][1])

    def _block(self, node: Node) -> None:
        for value in node.all_input_nodes:
            if value in self.members:
                self.members[value][0].blocked = True

    def _join(self, one: ChannelGroup, other: ChannelGroup) -> None:
        if one is other:
            return
        if one.channels != other.channels:
            one.blocked = other.blocked = True
            return
        one.writers += other.writers
        one.shifts += other.shifts
        one.readers += other.readers
        one.sources |= other.sources
        one.outputs += other.outputs
        one.clips |= other.clips
        one.blocked |= other.blocked
        self.members = {node: (one if group is other else group, axis) for node, (group, axis) in self.members.items()}
        self.weights = {key: one if group is other else group for key, group in self.weights.items()}


def _clipped(node: Node, before: tuple[int, ...], axis: int) -> int | None:
    """Return the axis of a clip to zero and a bound that some channels are known never to meet.

    That is known behind the first convolution, because images have limits. Without a bound it is a ReLU.
    """
    least, most = _bounds(node)
    source = operand(node, 0)
    first = source.target in _CONVOLUTIONS and operand(source, 0).op == "placeholder"
    return axis if least == 0.0 < most and (first or math.isinf(most)) else None


def _bounds(node: Node) -> tuple[float, float]:
    names = _CLIPS[node.target]
    if names is None:
        return 0.0, 6.0
    least, most = (argument(node, place, name, None) for place, name in enumerate(names, 1))
    return math.nan if least is None else float(least), math.inf if most is None else float(most)


def _same_axis(node: Node, before: tuple[int, ...], axis: int) -> int | None:
    return axis


def _permuted(node: Node, before: tuple[int, ...], axis: int) -> int | None:
    return permutation(node).index(axis)


def _reshaped(node: Node, before: tuple[int, ...], axis: int) -> int | None:
    """Return where a reshape leaves an axis, when it neither splits nor merges it."""
    after = sizes(node)
    for position, size in enumerate(after):
        if size == before[axis] and math.prod(after[:position]) == math.prod(before[:axis]):
            return position
    return None


def _averaged(node: Node, before: tuple[int, ...], axis: int) -> int | None:
    dims: Sequence[int] = argument(node, 1, "dim", ())
    removed = [dim % len(before) for dim in dims]
    if axis in removed:
        return None
    return axis if argument(node, 2, "keepdim", False) else axis - sum(dim < axis for dim in removed)


def _along_one(node: Node, before: tuple[int, ...], axis: int) -> int | None:
    """Return a slice or a concatenation: along any other axis the channels stay."""
    return axis if int(argument(node, 1, "dim", 0)) % len(before) != axis else None


def _rolled(node: Node, before: tuple[int, ...], axis: int) -> int | None:
    dims: Sequence[int] = argument(node, 2, "dims", ())
    return axis if dims and axis not in [dim % len(before) for dim in dims] else None


FOLLOWS: dict[object, Callable[[Node, tuple[int, ...], int], int | None]] = {
    **dict.fromkeys((*_HOMOGENEOUS, *_ADDS, *_PRODUCTS), _same_axis),
    **dict.fromkeys(_CLIPS, _clipped),
    **dict.fromkeys(PERMUTATIONS, _permuted),
    **dict.fromkeys(_RESHAPES, _reshaped),
    **dict.fromkeys((_aten.slice.Tensor, _aten.cat.default), _along_one),
    _aten.mean.dim: _averaged,
    _aten.roll.default: _rolled,
}
"""Operators that commute with a positive factor a channel, and where each leaves the channels' axis."""
