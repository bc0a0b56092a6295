"""Linear(w, b)(normed * g + t) -> Linear(w * g, b + w @ t)(normed): LayerNorm keeps the normalization alone."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from deploykit.fusion.affine import Affine, fold_forward
from deploykit.fusion.constants import argument, constant, shape_of, tidy

_NORM = torch.ops.aten.layer_norm.default


def fold_layernorm(module: GraphModule) -> int:
    """Fold LayerNorm's gain and shift into the linears after it, when they are all that reads it.

    Exact in real arithmetic. Left alone: a norm over several axes, one that anything but a linear
    reads (a residual, an output, a permutation), and linears whose weight is shared.

    Returns:
        How many were folded.
    """
    folded = sum(_fold(module, norm) for norm in module.graph.find_nodes(op="call_function", target=_NORM))
    if folded:
        tidy(module)
    return folded


def _fold(module: GraphModule, norm: Node) -> bool:
    gain_node, shift_node = argument(norm, 2, "weight", None), argument(norm, 3, "bias", None)
    gain, shift = constant(module, gain_node), constant(module, shift_node)
    computed = (gain is None and gain_node is not None) or (shift is None and shift_node is not None)
    if len(argument(norm, 1, "normalized_shape", ())) != 1 or computed or (gain is None and shift is None):
        return False
    affine = Affine(
        factor=torch.ones((), dtype=torch.double) if gain is None else gain.double(),
        shift=torch.zeros((), dtype=torch.double) if shift is None else shift.double(),
        axis=len(shape_of(norm)) - 1,
    )
    if not fold_forward(module, norm, affine):
        return False
    norm.args = (*norm.args[:2], None, None, *norm.args[4:])
    norm.kwargs = {name: value for name, value in norm.kwargs.items() if name not in ("weight", "bias")}
    return True
