"""softmax((x @ Wq) @ k^T * s) -> softmax((x @ (Wq * s)) @ k^T): the scale of the scores goes into Q's rows."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from deploykit.fusion.affine import channel_axis, is_layer, scale_outputs
from deploykit.fusion.constants import ATTENTION, argument, operand, sizes, tidy
from deploykit.fusion.shape_chains import arrivals, origin, sources


def fold_attention_scale(module: GraphModule) -> int:
    """Fold the scale of each attention into the layer that projects its queries.

    Which rows of a joint Q, K, V projection are Q's is found by following every channel through the
    reshapes, permutations and splits between. Exact in real arithmetic. Left alone: queries that
    something else reads too, that share a channel with keys or values, or that are computed
    (normalized, rotated) after the projection.

    Returns:
        How many attentions have a scale of 1 after it, and had another before.
    """
    folded = sum(_fold(module, attention) for attention in sources(module, ATTENTION))
    if folded:
        tidy(module)
    return folded


def scale_of(attention: Node) -> float:
    """Return the factor of the scores: as given, else D ** -0.5."""
    scale = argument(attention, 6, "scale", None)
    return float(scale) if scale is not None else sizes(operand(attention, 0))[-1] ** -0.5


def _fold(module: GraphModule, attention: Node) -> bool:
    query = attention.args[0]
    scale = scale_of(attention)
    if scale == 1.0 or not isinstance(query, Node) or query in attention.args[1:]:
        return False
    layer = origin(query)
    if not is_layer(module, layer):
        return False
    found = arrivals(layer)
    mine = [arrival for arrival in found if arrival.reader is attention and arrival.read is query]
    others = [arrival for arrival in found if arrival not in mine]
    if len(mine) != 1 or any(torch.isin(mine[0].channels, other.channels).any() for other in others):
        return False
    factor = torch.ones(sizes(layer)[channel_axis(layer)], dtype=torch.double)
    factor[mine[0].channels] = scale
    if not scale_outputs(module, layer, factor, torch.zeros((), dtype=torch.double)):
        return False
    attention.args = attention.args[:6]
    attention.kwargs = {**attention.kwargs, "scale": 1.0}
    return True
