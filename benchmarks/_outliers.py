"""Outliers planted in a network that computes what it did: loud channels of its norms, and readers deaf to them.

Some channels of a norm's gain and shift are multiplied by 50 and by 200, and the weights that read them divided by as
much, wherever nothing but ReLU, pooling, sums, gates and moves of elements stands between. In real arithmetic nothing
changes; a range for the whole tensor leaves the quiet channels one step of 256 or none.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from deploykit.arrays import FloatArray
from deploykit.backbones.base import BaseBackbone
from deploykit.calibration.channel_groups import FOLLOWS
from deploykit.fusion.affine import LINEAR, channel_axis
from deploykit.fusion.constants import argument, sizes
from deploykit.fusion.program import export_program

_aten = torch.ops.aten
FACTORS = (50.0, 200.0)
SHARE = 16
"""One channel in this many is loud by each factor, and at least one."""
LEAST_CHANNELS = 8
NORMS: dict[object, tuple[int, int]] = {
    _aten.batch_norm.default: (1, 1),
    _aten.group_norm.default: (2, 1),
    _aten.layer_norm.default: (2, -1),
}
"""Where a norm's gain is among its arguments, its shift behind it, and the axis of its channels."""
READERS = (LINEAR, _aten.conv2d.default, _aten.conv2d.padding)
MORE_FOLLOWS = (_aten.pad.default, _aten.dropout.default)
"""What else keeps each channel to itself: padding maps by zeros, and dropout where nothing is dropped."""


@dataclass(kw_only=True, eq=False)
class Group:
    """Channels that are loud together: the norms that write them, by their parameters' names, and their readers.

    A reader has the name of its weight, and how many groups its convolution has.
    """

    channels: int
    norms: list[tuple[str, str]] = field(default_factory=list)
    readers: list[tuple[str, int]] = field(default_factory=list)
    blocked: bool = False


def with_outliers(backbone: BaseBackbone, seed: int = 0) -> tuple[BaseBackbone, int]:
    """Return a copy with loud channels in every group of norms that can have them, and the number of norms.

    Raises:
        ValueError: no norm can have any.
    """
    groups, planted = norm_groups(backbone), copy.deepcopy(backbone)
    if not groups:
        raise ValueError(f"{backbone.spec.name}: no norm is read by layers alone, so no channel can be made loud.")
    parameters, generator = dict(planted.named_parameters()), np.random.default_rng(seed)
    with torch.no_grad():
        for group in groups:
            factors = torch.from_numpy(_factors(group.channels, generator))
            for name in (each for norm in group.norms for each in norm):
                parameters[name].mul_(factors)
            for name, count in group.readers:
                _deafen(parameters[name], factors, count)
    return planted, sum(len(group.norms) for group in groups)


def norm_groups(backbone: BaseBackbone) -> list[Group]:
    """Return the groups of a backbone's norms whose channels can be scaled, in the order of its graph."""
    program = export_program(backbone, replace(backbone.input_spec, batch=2))
    walk = _Walk(program.graph_signature.inputs_to_parameters)
    for node in program.graph.nodes:
        walk.visit(node)
    found = dict.fromkeys(group for group, _ in walk.members.values())
    return [group for group in found if group.readers and not group.blocked and group.channels >= LEAST_CHANNELS]


def _factors(channels: int, generator: np.random.Generator) -> FloatArray:
    order, count = generator.permutation(channels), max(1, channels // SHARE)
    factors = np.ones(channels, np.float32)
    for number, factor in enumerate(FACTORS):
        factors[order[number * count : (number + 1) * count]] = factor
    return factors


def _deafen(weight: Tensor, factors: Tensor, groups: int) -> None:
    """Divide a weight ``(out, in / groups, ...)`` by the factors of the channels ``(in,)`` that it reads."""
    parts = weight.view(groups, weight.shape[0] // groups, weight.shape[1], -1)
    parts.div_(factors.reshape(groups, 1, weight.shape[1], 1))


class _Walk:
    """One walk over a graph; ``members`` has the group of a tensor and the axis of its channels."""

    def __init__(self, parameters: dict[str, str]) -> None:
        self.parameters = parameters
        self.members: dict[Node, tuple[Group, int]] = {}

    def visit(self, node: Node) -> None:
        if node.op == "output":
            self._block(node.all_input_nodes)
        elif node.op != "call_function":
            return
        elif node.target in NORMS:
            self._block(node.all_input_nodes)
            self._write(node, *NORMS[node.target])
        elif node.target in READERS:
            self._read(node)
        elif not self._follow(node):
            self._block(node.all_input_nodes)

    def _own(self, value: object) -> str | None:
        """Return the name of a parameter that one node alone reads."""
        if not isinstance(value, Node) or len(value.users) != 1:
            return None
        return self.parameters.get(value.name)

    def _write(self, node: Node, position: int, axis: int) -> None:
        gain, shift = (
            self._own(argument(node, position + step, name, None)) for step, name in enumerate(("weight", "bias"))
        )
        if gain is not None and shift is not None:
            axis %= len(sizes(node))
            self.members[node] = (Group(channels=sizes(node)[axis], norms=[(gain, shift)]), axis)

    def _read(self, node: Node) -> None:
        source, weight = node.args[0], self._own(node.args[1])
        others = [value for value in node.all_input_nodes if value is not source]
        self._block(others)
        if source not in self.members:
            return
        group, axis = self.members[source]
        if weight is None or axis != channel_axis(node):
            group.blocked = True
        else:
            group.readers.append((weight, int(argument(node, 6, "groups", 1)) if node.target != LINEAR else 1))

    def _follow(self, node: Node) -> bool:
        """Let a node's output join the groups of its inputs; False where it mixes channels, or other tensors in."""
        inputs = [value for value in node.all_input_nodes if value in self.members]
        follow = FOLLOWS.get(node.target)
        if not inputs or (follow is None and node.target not in MORE_FOLLOWS):
            return False
        group, axis = self.members[inputs[0]]
        gated = node.target in (_aten.mul.Tensor, _aten.mul_.Tensor)
        alone = len(inputs) == 1 and (gated or len(node.all_input_nodes) == 1)
        joined = (
            not gated
            and len(inputs) == len(node.all_input_nodes)
            and all(
                self.members[value][1] == axis and self.members[value][0].channels == group.channels for value in inputs
            )
        )
        after = axis if follow is None else follow(node, sizes(inputs[0]), axis)
        if not (alone or joined) or after is None:
            return False
        for value in inputs[1:]:
            self._join(group, self.members[value][0])
        self.members[node] = (group, after)
        return True

    def _block(self, values: Iterable[Node]) -> None:
        for value in values:
            if value in self.members:
                self.members[value][0].blocked = True

    def _join(self, one: Group, other: Group) -> None:
        if one is other:
            return
        one.norms += other.norms
        one.readers += other.readers
        one.blocked |= other.blocked
        self.members = {node: (one if group is other else group, axis) for node, (group, axis) in self.members.items()}
