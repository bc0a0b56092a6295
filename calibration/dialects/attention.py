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
from deploykit.fusion.attention_pattern import JointProjection, SelfAttention, match_attention

_DOMAIN = "com.microsoft"
_MOVES = ("Reshape", "Transpose", "Split", "Squeeze", "Slice", "Mul")


def quantize_attentions(graph: ir.Graph, plan: QuantizationPlan) -> int:
    """Write each attention over an integer projection as one operator, in place; its parts are left unused.

    Left to the standard operators: position biases, which the operator does not take, windows, projections
    that two attentions read, and all that `match_attention` does not know.

    Returns:
        How many were written.
    """
    written = 0
    for softmax in [node for node in graph if node.op_type == "Softmax"]:
        found = match_attention(softmax)
        if found is None or found.position_bias is not None or not _keeps_order(found):
            continue
        if len(_products(found.projection.result)) > 2:
            continue  # the last block gives its tokens and, of the class token alone, the logits
        name = _product_name(found.projection)
        if name not in plan.placement.weights:
            continue
        _write(graph, found, name, plan)
        written += 1
    if written:
        graph.opset_imports[_DOMAIN] = 1
    return written


def _keeps_order(found: SelfAttention) -> bool:
    """Whether the tokens are one sequence, ``(N, T, C)`` before and after."""
    shape, tokens = found.merged.shape, np.arange(found.projection.count)
    inside = found.tokens is found.projection.tokens and shape is not None and len(shape) == 3
    return inside and np.array_equal(found.before, tokens[None]) and np.array_equal(found.after.reshape(-1), tokens)


def _product_name(projection: JointProjection) -> str:
    """The name of the product of tokens and weight."""
    add = projection.result.producer()
    return next(str(node.name) for node in projection.weight.consumers() if add in node.outputs[0].consumers())


def _products(projected: ir.Value) -> set[ir.Node]:
    """What reads queries, keys and values: a product for the scores and one for the values an attention."""
    found: set[ir.Node] = set()
    for node in projected.consumers():
        found |= set().union(*map(_products, node.outputs)) if node.op_type in _MOVES else {node}
    return found


def _write(graph: ir.Graph, found: SelfAttention, name: str, plan: QuantizationPlan) -> None:
    weight, bias = found.projection.weight.const_value, found.projection.bias.const_value
    assert weight is not None and bias is not None  # noqa: S101  (constants, as the match saw; narrows the types)
    integers, scales = plan.integers_of(name, weight.numpy(), 1)
    shift = plan.bias_shift.get(name)
    shifted = bias.numpy() if shift is None else bias.numpy() + shift
    constants = {
        part: add_constant(graph, f"{name}/{part}", array)
        for part, array in (("integers", integers), ("bias", shifted.astype(np.float32)), ("scale", scales))
    }
    quantized, scale, zero_point = quantized_at_each_call(graph, found.projection.tokens)
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
