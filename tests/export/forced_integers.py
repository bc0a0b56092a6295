"""Quantized graphs layer by layer: what each gives of another graph's integers, so that no layer inherits a difference.

A deep network in integers tells two ways of adding floats apart by more than any placement does: a sum near the middle
of two integers falls to one side or the other, and the layers behind it multiply the difference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from deploykit.calibration.quantizer_nodes import UINT8_ZERO, axis_of, parameters
from deploykit.onnx_session import onnx_session

Run = Callable[[ir.Model, dict[str, np.ndarray]], dict[str, np.ndarray]]
"""Computes a graph's outputs by name, somewhere."""


def _tensor(quantize: ir.Node) -> str:
    """The tensor that a quantizer rounds, by its name in the float graph."""
    dialects = str(quantize.name).endswith("/quantize")
    name = str(quantize.name).removesuffix("/quantize") if dialects else str(quantize.inputs[0].name)
    return name.removesuffix("/clipped")


def quantizers(model: ir.Model) -> dict[str, ir.Node]:
    """The quantizers of a graph's activations, by tensor."""
    found = [node for node in model.graph if node.op_type == "QuantizeLinear"]
    return {_tensor(node): node for node in found if not node.inputs[0].is_initializer()}


def integers_of(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run a graph node by node: every activation's integers as uint8, from 0 where it has one scale a channel."""
    graph, found = model.clone(), {}
    names = {tensor: str(node.outputs[0].name) for tensor, node in quantizers(graph).items()}
    for node in quantizers(graph).values():
        node.outputs[0].type = ir.TensorType(node.inputs[2].dtype)
    graph.graph.outputs.extend(node.outputs[0] for node in quantizers(graph).values())
    values = onnx_session(graph, optimize=False).run(list(names.values()), dict(feeds))
    for (tensor, node), integers in zip(quantizers(graph).items(), values, strict=True):
        shifted = integers.astype(np.int64) + (UINT8_ZERO if integers.dtype == np.int8 else 0)
        scale, zero_point = parameters(node)
        if scale.size > 1:
            shape = [-1 if axis == axis_of(node, integers.ndim) else 1 for axis in range(integers.ndim)]
            zero = zero_point.reshape(shape)  # 128 in a channel that was zero in calibration, whose reach is ours too
            shifted = np.clip(np.rint((shifted - zero) * (255 / (255 - zero))), 0, 255)
        found[tensor] = shifted.astype(np.uint8)
    return found


def differences(model: ir.Model, given: Mapping[str, np.ndarray], feeds: Mapping[str, np.ndarray], run: Run):
    """How far each tensor's integers are from the given ones, where every tensor before it has those.

    Args:
        model: a dialect's graph, in uint8.
        given: integers by tensor, as `integers_of` gives them.
        feeds: the graph's input.
        run: computes the graph.
    """
    forced = model.clone()
    graph, outputs = forced.graph, {}
    for tensor, node in quantizers(forced).items():
        own, source = node.outputs[0], node.inputs[0]
        if source.is_graph_input():
            continue
        kind, shape = ir.TensorType(ir.DataType.UINT8), ir.Shape(given[tensor].shape)
        replacement = ir.Value(name=f"given/{tensor}", type=kind, shape=shape)
        for use in list(own.uses()):
            use.node.replace_input_with(use.idx, replacement)
        own.type, own.shape = kind, shape
        graph.inputs.append(replacement)
        outputs[str(own.name)] = tensor
    ends = {tensor: node.outputs[0] for tensor, node in quantizers(forced).items()}
    graph.outputs.extend(ends[tensor] for tensor in outputs.values())
    taken = {f"given/{tensor}": given[tensor] for tensor in outputs.values()}
    found = run(forced, {**feeds, **taken})
    return {tensor: found[name].astype(np.int64) - given[tensor].astype(np.int64) for name, tensor in outputs.items()}
