"""Self-attention whose projection is in integers, as ONNX Runtime's own operator.

``Attention(x, W, b) -> QAttention(q, Wq, b, s, Ws, z)`` with ``q, s, z = DynamicQuantizeLinear(x)``: the projection
is written straight into the heads' layout, with no Split, Transpose or Reshape; scores and values stay in float.
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.QAttention
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from deploykit.calibration.dialects.dynamic import quantized_at_each_call
from deploykit.calibration.plan import QuantizationPlan, add_constant
from deploykit.calibration.ranges import quantize_weight
from deploykit.fusion.onnx_attention import Attention, find_attention

_DOMAIN = "com.microsoft"
_MOVES = ("Reshape", "Transpose", "Split", "Squeeze", "Slice", "Mul")


def quantize_attentions(graph: ir.Graph, plan: QuantizationPlan) -> int:
    """Write each attention over an integer projection as one operator, in place; its parts are left unused.

    Left to the standard operators: position biases, which the operator does not take, projections that
    two attentions read, and all that `find_attention` does not know.

    Returns:
        How many were written.
    """
    written = 0
    for softmax in [node for node in graph if node.op_type == "Softmax"]:
        found = find_attention(softmax)
        if found is None or found.position_bias is not None:
            continue
        if len(_products(found.projected)) > 2:
            continue  # the last block gives its tokens and, of the class token alone, the logits
        name = _projection(found)
        if name not in plan.placement.weights:
            continue
        _write(graph, found, name, plan.bias_shift.get(name))
        written += 1
    if written:
        graph.opset_imports[_DOMAIN] = 1
    return written


def _projection(found: Attention) -> str:
    """The name of the product of tokens and weight."""
    add = found.projected.producer()
    return next(str(node.name) for node in found.weight.consumers() if add in node.outputs[0].consumers())


def _products(projected: ir.Value) -> set[ir.Node]:
    """What reads queries, keys and values: a product for the scores and one for the values an attention."""
    found: set[ir.Node] = set()
    for node in projected.consumers():
        found |= set().union(*map(_products, node.outputs)) if node.op_type in _MOVES else {node}
    return found


def _write(graph: ir.Graph, found: Attention, name: str, shift: np.ndarray | None) -> None:
    weight, bias = found.weight.const_value, found.bias.const_value
    assert weight is not None and bias is not None  # noqa: S101  (constants, as find_attention saw; narrows the types)
    integers, scales = quantize_weight(weight.numpy(), axis=1)
    shifted = bias.numpy() if shift is None else bias.numpy() + shift
    constants = {
        part: add_constant(graph, f"{name}/{part}", array)
        for part, array in (("integers", integers), ("bias", shifted.astype(np.float32)), ("scale", scales))
    }
    quantized, scale, zero_point = quantized_at_each_call(graph, found.tokens)
    node = ir.node(
        "QAttention",
        [quantized, constants["integers"], constants["bias"], scale, constants["scale"], None, zero_point],
        {"num_heads": found.heads, "scale": found.scale},
        domain=_DOMAIN,
        name=f"{found.merged.name}/attention",
    )
    graph.append(node)  # the renderer sorts the graph
    ir.convenience.replace_all_uses_with(found.merged, node.outputs[0])
    node.outputs[0].name = f"{found.merged.name}/attended"
