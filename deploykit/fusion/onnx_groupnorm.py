"""GroupNorm, in the master graph BatchNorm(Reshape(InstanceNorm(Reshape(x, groups)))), as a runtime is fast at it.

In OpenVINO: (x - mean) * (weight / deviation) + bias. The master graph's form reads maps channel by channel, where
OpenVINO keeps them position by position and copies each into another layout and back; sums over positions take maps
as they lie, and what groups share is small.

In ONNX Runtime: Conv(InstanceNorm(x)), depthwise 1x1, for the affine part. It takes the residual and the activation
behind it along, in the blocked layout of the convolutions around.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from deploykit.arrays import Array
from deploykit.fusion.data_movement import constant, only_reader, producer, sizes
from deploykit.fusion.graph_writer import GraphWriter

_BLOCK = 16


@dataclass(frozen=True, kw_only=True)
class _GroupNorm:
    """``affine`` gives GroupNorm(maps) of ``(N, C, H, W)``, its ``weight`` and ``bias`` ``(C,)`` in it."""

    affine: ir.Node
    maps: ir.Value
    groups: int
    epsilon: float
    weight: Array
    bias: Array


def spell_out_groupnorm(model: ir.Model) -> int:
    """Write each GroupNorm by means over positions and over the channels of a group, in place.

    Exact in real arithmetic; deviations are taken from the mean, as the norm itself does. Left alone:
    half precision, norms of one group, and sizes that are not static but for the batch.

    Returns:
        How many norms were written.
    """
    return _rewrite(model, _spell_out)


def convolve_groupnorm(model: ir.Model) -> int:
    """Write the affine part of each GroupNorm as a depthwise convolution, in place.

    Exact in real arithmetic. Left alone as in `spell_out_groupnorm`, and channels that are not whole
    blocks of 16, for which ONNX Runtime has no fast depthwise convolution.

    Returns:
        How many norms were written.
    """
    return _rewrite(model, _convolve)


def _rewrite(model: ir.Model, write: Callable[[ir.Model, _GroupNorm], bool]) -> int:
    found = [norm for node in model.graph if node.op_type == "BatchNormalization" and (norm := _match(node))]
    written = sum(write(model, norm) for norm in found)
    if written:
        common.RemoveUnusedNodesPass()(model)
    return written


def _match(affine: ir.Node) -> _GroupNorm | None:
    chain = [affine]
    for expected in ("Reshape", "InstanceNormalization", "Reshape"):
        value = chain[-1].inputs[0]
        node = producer(value)
        if node is None or value is None or node.op_type != expected or only_reader(value) is not chain[-1]:
            return None
        chain.append(node)
    maps, shape = chain[-1].inputs[0], affine.outputs[0].shape
    weight, bias, mean, variance = (constant(value) for value in affine.inputs[1:])
    plain = [constant(value) for value in chain[2].inputs[1:]]
    if maps is None or maps.dtype != ir.DataType.FLOAT or shape is None or len(shape) != 4:
        return None
    same = maps.shape is not None and list(maps.shape[1:]) == list(shape[1:])  # the batch may have another name
    parts = (weight, bias, mean, variance, *plain)
    if not same or any(part is None for part in parts) or affine.outputs[0].is_graph_output():
        return None
    if not all(isinstance(side, int) for side in shape[1:]) or weight is None or bias is None or plain[0] is None:
        return None
    identity = np.all(mean == 0) and np.all(variance == 1) and np.all(plain[0] == 1) and np.all(plain[1] == 0)
    groups = plain[0].size
    if not identity or affine.attributes.get_float("epsilon", 1e-5) != 0 or groups == 1 or weight.size % groups:
        return None
    epsilon = chain[2].attributes.get_float("epsilon", 1e-5)
    return _GroupNorm(affine=affine, maps=maps, groups=groups, epsilon=epsilon, weight=weight, bias=bias)


def _spell_out(model: ir.Model, norm: _GroupNorm) -> bool:
    result = norm.affine.outputs[0]
    channels, *sides = sizes(norm.maps)
    graph = GraphWriter(model=model, before=norm.affine, name=f"{result.name}_group")
    one, group = (channels, 1, 1), (norm.groups, channels // norm.groups)
    positions = graph.constant(np.array([2, 3]), "positions")
    last = graph.constant(np.array([2]), "members")

    def shared(value: ir.Value, part: str) -> ir.Value:
        """Return the mean over the channels of each group, ``(N, groups, 1)``."""
        grouped = graph.shaped(value, group, f"{part}_groups")
        return graph.node("ReduceMean", [grouped, last], (norm.groups, 1), f"{part}_shared")

    means = graph.node("ReduceMean", [norm.maps, positions], one, "means")
    ones = graph.constant(np.ones((1, *group), np.float32), "ones")
    spread = graph.node("Mul", [shared(means, "mean"), ones], group, "mean_spread")
    centred = graph.node("Sub", [norm.maps, graph.shaped(spread, one, "mean")], (channels, *sides), "centred")
    lengths = graph.node("ReduceL2", [centred, positions], one, "lengths")
    squares = graph.node("Mul", [lengths, lengths], one, "squares")
    count = graph.constant(np.array(1 / math.prod(sides), np.float32), "count")
    variance = graph.node("Mul", [shared(squares, "squares"), count], (norm.groups, 1), "variance")
    epsilon = graph.constant(np.array(norm.epsilon, np.float32), "epsilon")
    raised = graph.node("Add", [variance, epsilon], (norm.groups, 1), "raised")
    deviation = graph.node("Sqrt", [raised], (norm.groups, 1), "deviation")
    weight = graph.constant(norm.weight.reshape(1, *group), "weight")
    factor = graph.node("Div", [weight, deviation], group, "factor_groups")
    scaled = graph.node("Mul", [centred, graph.shaped(factor, one, "factor")], (channels, *sides), "scaled")
    bias = graph.constant(norm.bias.reshape(1, *one), "bias")
    ir.convenience.replace_all_uses_with(result, graph.node("Add", [scaled, bias], (channels, *sides), "normed"))
    return True


def _convolve(model: ir.Model, norm: _GroupNorm) -> bool:
    result, normed = norm.affine.outputs[0], norm.affine.inputs[0]
    if norm.weight.size % _BLOCK:
        return False
    graph = GraphWriter(model=model, before=norm.affine, name=f"{result.name}_affine")
    kernel = graph.constant(norm.weight.reshape(-1, 1, 1, 1), "weight")
    settings = {"group": norm.weight.size}
    layer = graph.node("Conv", [normed, kernel, norm.affine.inputs[2]], sizes(result), "conv", settings)
    ir.convenience.replace_all_uses_with(result, layer)
    return True
