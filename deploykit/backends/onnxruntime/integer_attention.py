"""Self-attention whose projection is in integers, as ONNX Runtime's kernels have it, whole or in windows.

``split(x @ W + b) -> Attention(Q, K, V, bias)`` with Q, K and V products of one ``q, s, z = DynamicQuantizeLinear(x)``:
the runtime reads the heads where each product wrote them, with no Split, Transpose or Reshape. Scores and values
stay in float.
https://onnx.ai/onnx/operators/onnx__Attention.html
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import onnx_ir as ir

from deploykit.backends.onnxruntime.dynamic_products import quantized_at_each_call
from deploykit.calibration.plan import QuantizationPlan
from deploykit.fusion.attention_pattern import JointProjection, SelfAttention, replace_attentions
from deploykit.fusion.graph_writer import GraphWriter

ATTENTION_OPSET = 23
"""The first opset with an Attention; ONNX Runtime has it since 1.23."""

PARTS = ("queries", "keys", "values")
"""What a joint projection is cut into; each product's name ends with its part."""

_DOMAIN = "com.microsoft"
_MOVES = ("Reshape", "Transpose", "Split", "Squeeze", "Slice", "Mul")


def quantize_attentions(model: ir.Model, plan: QuantizationPlan) -> QuantizationPlan:
    """Write each attention over an integer projection as one operator; the nodes are left unsorted.

    Left to the standard operators: projections that two attentions read, and all that `match_attention`
    does not know.
    """
    if not plan.imported and replace_attentions(
        model, partial(_attend, plan=plan), lambda found: _is_integer(found, plan)
    ):
        model.graph.opset_imports.update({"": ATTENTION_OPSET, _DOMAIN: 1})
    return plan


def _is_integer(found: SelfAttention, plan: QuantizationPlan) -> bool:
    if len(_products(found.projection.result)) > 2:
        return False  # the last block gives its tokens and, of the class token alone, the logits
    return _product_name(found.projection) in plan.placement.weights


def _product_name(projection: JointProjection) -> str:
    """Return the name of the product of tokens and weight."""
    add = projection.result.producer()
    return next(str(node.name) for node in projection.weight.consumers() if add in node.outputs[0].consumers())


def _products(projected: ir.Value) -> set[ir.Node]:
    """Return what reads queries, keys and values: a product for the scores and one for the values an attention."""
    found: set[ir.Node] = set()
    for node in projected.consumers():
        found |= set().union(*map(_products, node.outputs)) if node.op_type in _MOVES else {node}
    return found


def _attend(graph: GraphWriter, found: SelfAttention, tokens: ir.Value, plan: QuantizationPlan) -> ir.Value:
    name, projection, area = _product_name(found.projection), found.projection, found.before.shape[1]
    weight, bias = projection.weight.const_value, projection.bias.const_value
    assert weight is not None and bias is not None  # noqa: S101  (constants, as the match saw; narrows the types)
    integers, scales = plan.integers_of(name, weight.numpy(), 1)
    shifted = np.asarray(bias.numpy() + plan.bias_shift.get(name, 0.0), np.float32)
    quantized, scale, zero_point = quantized_at_each_call(graph.model.graph, tokens)
    inputs: list[ir.Value | None] = []
    products = replace(graph, name=name)
    for place, part in enumerate(PARTS):
        columns = slice(place * projection.width, (place + 1) * projection.width)
        own_weight, own_bias, steps = (
            products.constant(numbers[..., columns], f"{part}_{kind}")
            for kind, numbers in (("integers", integers), ("bias", shifted), ("scale", scales))
        )
        operands = [quantized, own_weight, scale, steps, zero_point, None, own_bias]
        inputs.append(products.node("MatMulIntegerToFloat", operands, (area, projection.width), part, domain=_DOMAIN))
    if found.position_bias is not None:
        inputs.append(graph.constant(found.position_bias, "position_bias"))
    attributes = {"q_num_heads": found.heads, "kv_num_heads": found.heads, "scale": found.scale}
    return graph.node("Attention", inputs, (area, projection.width), "attended", attributes)
