"""MatMul, Add, split heads, softmax(q @ k^T * s + bias) @ v, merge heads -> com.microsoft.Attention, in ONNX graphs.

ONNX Runtime's operator writes the projection straight into the heads' layout: no Split, no Transpose, no Reshape.
Attention in windows cuts the map before the projection, by one Gather of whole tokens that also rolls it, and joins
it again by another. Operator and layout:
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.Attention
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from deploykit.fusion.attention_pattern import SelfAttention, match_attention
from deploykit.fusion.graph_writer import GraphWriter
from deploykit.fusion.moves import sizes

_DOMAIN = "com.microsoft"


def fuse_onnxruntime_attention(model: ir.Model) -> int:
    """Write self-attention with a joint projection, whole or in windows, as ONNX Runtime's own operator, in place.

    Exact in real arithmetic. Left alone: what `match_attention` does not find.

    Returns:
        How many attentions were written.
    """
    fused = 0
    for node in list(model.graph):
        found = match_attention(node)
        if found is not None:
            _write(model, found)
            fused += 1
    if fused:
        model.graph.opset_imports[_DOMAIN] = 1
        common.RemoveUnusedNodesPass()(model)
    return fused


def _write(model: ir.Model, found: SelfAttention) -> None:
    last, projection = found.merged.producer(), found.projection
    assert last is not None and found.merged.shape is not None  # noqa: S101  (a moved value; narrows the types)
    graph = GraphWriter(model=model, before=last, name=f"{found.merged.name}_attention")
    windows, area = found.before.shape
    tokens = graph.taken(found.tokens, found.before.reshape(-1), "cut")
    tokens = graph.shaped(tokens, (area, sizes(found.tokens)[-1]), "windows")
    absent = [] if found.position_bias is None else [None, None, graph.constant(found.position_bias, "position_bias")]
    attended = graph.node(
        "Attention",
        [tokens, projection.weight, projection.bias, *absent],
        (area, projection.width),
        "attended",
        {"num_heads": found.heads, "scale": found.scale},
        domain=_DOMAIN,
    )
    attended = graph.shaped(attended, (windows * area, projection.width), "joined")
    attended = graph.taken(attended, found.after, "placed")
    attended = graph.shaped(attended, sizes(found.merged), "merged")
    ir.convenience.replace_all_uses_with(found.merged, attended)
