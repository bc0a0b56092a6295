"""Transpose(MatMul(x, w) + b) -> Conv(Transpose(x), w^T, b), 1x1, in ONNX graphs: permutations move in front of layers.

The MLP of a ConvNeXt block stands between maps ``(N, C, H, W)`` of convolutions and works on ``(N, H, W, C)``.
As convolutions its layers take their biases and the block's residual along, and hand each other maps as the
runtime likes them. In ONNX Runtime this pays for the whole MLP, and on large maps, such as Swin's, with another
permutation behind it; in OpenVINO it pays for the last layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from deploykit.fusion.data_movement import constant, is_static, only_reader, producer, sizes
from deploykit.fusion.graph_writer import GraphWriter

_CHANNELS_FIRST, _CHANNELS_LAST = (0, 3, 1, 2), (0, 2, 3, 1)
LARGE = 784
"""Positions of a map from which on convolutions are worth two permutations (28 x 28; at 14 x 14 they are not)."""
_ACTIVATIONS = ("Gelu", "Relu", "HardSwish", "Sigmoid", "Tanh")


@dataclass(frozen=True, kw_only=True)
class _Step:
    """An activation, or with ``weight`` and ``bias`` a linear layer: ``node`` gives its result."""

    node: ir.Node
    source: ir.Value
    weight: ir.Value | None = None
    bias: ir.Value | None = None


def convolve_mlps(model: ir.Model) -> int:
    """Write MLPs of two layers in front of a permutation to channels first, or on large maps, as 1x1 convolutions.

    Exact in real arithmetic. Left alone: half precision and Q/DQ graphs, results that something else
    reads too, layers without a bias, and anything but an activation between the two.

    Returns:
        How many MLPs were written.
    """
    written = _tidied(model, _convolve(model, layers=2))
    for node in list(model.graph):
        result = node.outputs[0]
        steps = _steps(result, 2) if node.op_type == "Add" and _is_large(result) else None
        if steps is not None:
            _write(model, node, steps, result, permuted=False)
            written += 1
    return _tidied(model, written)


def convolve_last_layers(model: ir.Model) -> int:
    """Write each linear layer in front of a permutation to channels first as a 1x1 convolution; see `convolve_mlps`."""
    return _tidied(model, _convolve(model, layers=1))


def _convolve(model: ir.Model, layers: int) -> int:
    written = 0
    for node in list(model.graph):
        permuted = node.op_type == "Transpose" and node.attributes.get_ints("perm", ()) == _CHANNELS_FIRST
        steps = _steps(node.inputs[0], layers) if permuted else None
        if steps is not None:
            _write(model, node, steps, node.outputs[0], permuted=True)
            written += 1
    return written


def _tidied(model: ir.Model, written: int) -> int:
    if written:
        common.RemoveUnusedNodesPass()(model)
    return written


def _is_large(maps: ir.Value) -> bool:
    return is_static(maps) and len(sizes(maps)) == 3 and math.prod(sizes(maps)[:2]) >= LARGE


def _steps(value: ir.Value | None, layers: int) -> list[_Step] | None:
    """Return the layers and activations that end in a value ``(N, H, W, C)``, first to last; None for fewer layers."""
    steps: list[_Step] = []
    while sum(step.weight is not None for step in steps) < layers:
        step = _step(value) if value is not None else None
        if step is None:
            return None
        steps.insert(0, step)
        value = step.source
    maps = steps[0].source
    whole = maps.dtype == ir.DataType.FLOAT and is_static(maps) and len(sizes(maps)) == 3
    return steps if whole else None


def _step(value: ir.Value) -> _Step | None:
    node = producer(value)
    if node is None or only_reader(value) is None or node.inputs[0] is None:
        return None
    if node.op_type in _ACTIVATIONS and node.domain == "":
        return _Step(node=node, source=node.inputs[0])
    for product, bias in (node.inputs, node.inputs[::-1]) if node.op_type == "Add" else ():
        matmul, vector = producer(product), constant(bias)
        if matmul is None or matmul.op_type != "MatMul" or vector is None or vector.ndim != 1:
            continue
        source, weight = matmul.inputs
        matrix = constant(weight)
        whole = matrix is not None and matrix.ndim == 2 and matrix.shape[1:] == vector.shape
        if whole and source is not None and only_reader(matmul.outputs[0]) is node:
            return _Step(node=node, source=source, weight=weight, bias=bias)
    return None


def _write(model: ir.Model, before: ir.Node, steps: list[_Step], result: ir.Value, *, permuted: bool) -> None:
    """Let what reads ``result`` read convolutions, and a permutation of them where it is not ``permuted`` itself."""
    *sides, channels = sizes(steps[0].source)
    graph = GraphWriter(model=model, before=before, name=f"{result.name}_pointwise")
    value = graph.node("Transpose", [steps[0].source], (channels, *sides), "maps", {"perm": _CHANNELS_FIRST})
    for place, step in enumerate(steps):
        matrix = constant(step.weight)
        if matrix is None:
            value = graph.node(step.node.op_type, [value], sizes(value), f"act{place}", step.node.attributes)
            continue
        channels = matrix.shape[1]
        kernel = graph.constant(np.ascontiguousarray(matrix.T)[:, :, None, None], f"weight{place}")
        value = graph.node("Conv", [value, kernel, step.bias], (channels, *sides), f"conv{place}")
    if not permuted:
        value = graph.node("Transpose", [value], (*sides, channels), "tokens", {"perm": _CHANNELS_LAST})
    ir.convenience.replace_all_uses_with(result, value)
