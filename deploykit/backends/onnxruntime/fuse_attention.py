"""MatMul, Add, split heads, softmax(q @ k^T * s + bias) @ v, merge heads -> com.microsoft.Attention, in ONNX graphs.

ONNX Runtime's operator writes the projection straight into the heads' layout: no Split, no Transpose, no Reshape.
Operator and layout:
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.Attention
"""

from __future__ import annotations

import onnx_ir as ir

from deploykit.fusion.attention_pattern import SelfAttention, replace_attentions
from deploykit.fusion.graph_writer import GraphWriter

_DOMAIN = "com.microsoft"


def fuse_attention(model: ir.Model) -> int:
    """Write self-attention with a joint projection, whole or in windows, as ONNX Runtime's own operator, in place.

    Exact in real arithmetic. Left alone: what `match_attention` does not find.

    Returns:
        How many attentions were written.
    """
    fused = replace_attentions(model, _attend)
    if fused:
        model.graph.opset_imports[_DOMAIN] = 1
    return fused


def _attend(graph: GraphWriter, found: SelfAttention, tokens: ir.Value) -> ir.Value:
    projection, area = found.projection, found.before.shape[1]
    absent = [] if found.position_bias is None else [None, None, graph.constant(found.position_bias, "position_bias")]
    return graph.node(
        "Attention",
        [tokens, projection.weight, projection.bias, *absent],
        (area, projection.width),
        "attended",
        {"num_heads": found.heads, "scale": found.scale},
        domain=_DOMAIN,
    )
