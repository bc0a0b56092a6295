"""split(x @ [Wq Wk Wv]) -> x @ Wq, x @ Wk, x @ Wv, heads split from each by one Transpose, in ONNX graphs.

OpenVINO runs two products, their softmax and the permutations around them as one kernel, where each operand has a
permutation of its own. Queries, keys and values of a joint projection are copied out of it first.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from deploykit.arrays import Array
from deploykit.fusion.attention_pattern import SelfAttention, replace_attentions
from deploykit.fusion.data_movement import constant
from deploykit.fusion.graph_writer import GraphWriter


def separate_heads(model: ir.Model) -> int:
    """Write self-attention with a joint projection, whole or in windows, as three projections, in place.

    Exact in real arithmetic. Left alone: what `match_attention` does not find.

    Returns:
        How many attentions were written.
    """
    return replace_attentions(model, _attend)


def _attend(graph: GraphWriter, found: SelfAttention, tokens: ir.Value) -> ir.Value:
    area, width = found.before.shape[1], found.projection.width
    heads, depth = found.heads, width // found.heads
    query, keys, values = (_part(graph, tokens, found, place, name) for place, name in enumerate(("q", "k", "v")))
    keys = graph.node("Transpose", [keys], (heads, depth, area), "keys", {"perm": (0, 1, 3, 2)})
    scores = graph.node("MatMul", [query, keys], (heads, area, area), "scores")
    if found.position_bias is not None:
        bias = graph.constant(found.position_bias, "position_bias")
        scores = graph.node("Add", [scores, bias], (heads, area, area), "biased")
    weights = graph.node("Softmax", [scores], (heads, area, area), "weights", {"axis": -1})
    attended = graph.node("MatMul", [weights, values], (heads, area, depth), "attended")
    return graph.node("Transpose", [attended], (area, heads, depth), "merged_heads", {"perm": (0, 2, 1, 3)})


def _part(graph: GraphWriter, tokens: ir.Value, found: SelfAttention, place: int, name: str) -> ir.Value:
    """Queries, keys or values ``(N * windows, heads, tokens of a window, D)``; queries carry the scale."""
    (_, area), width = found.before.shape, found.projection.width
    columns = slice(place * width, (place + 1) * width)
    factor = found.scale if place == 0 else 1.0
    weight, bias = (
        _scaled(constant(value), factor)[..., columns] for value in (found.projection.weight, found.projection.bias)
    )
    product = graph.node("MatMul", [tokens, graph.constant(weight, f"{name}_weight")], (area, width), f"{name}_product")
    part = graph.node("Add", [product, graph.constant(bias, f"{name}_bias")], (area, width), name)
    heads = (found.heads, width // found.heads)
    split = graph.shaped(part, (area, *heads), f"{name}_split")
    return graph.node("Transpose", [split], (heads[0], area, heads[1]), f"{name}_heads", {"perm": (0, 2, 1, 3)})


def _scaled(numbers: Array | None, factor: float) -> Array:
    assert numbers is not None  # noqa: S101  (checked by the pattern; narrows the type)
    return (numbers.astype(np.double) * factor).astype(np.float32)
