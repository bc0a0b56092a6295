"""BatchNorm(x) = x * s + t, s = gamma / sqrt(var + eps), t = beta - mean * s: Conv(w, b) before it takes w*s, b*s + t.

A layer after it takes ``w * s`` along its inputs and ``b + sum(w * t)``, where no padding is between.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from deploykit.fusion.affine import Affine, fold
from deploykit.fusion.constants import argument, constant, operand, tidy

_NORM = torch.ops.aten.batch_norm.default


def fold_batchnorm(module: GraphModule) -> int:
    """Fold inference BatchNorms into the convolution or linear before them, else into those after them.

    Works on the flat graph of a `torch.export` program in eval mode, in place; exact in real
    arithmetic. Left alone: a layer whose weight is shared, a BatchNorm in training mode, one whose
    input is used elsewhere, one before a padded convolution, one between other operators.

    Returns:
        How many were folded.
    """
    folded = 0
    for norm in module.graph.find_nodes(op="call_function", target=_NORM):
        found = norm_affine(module, norm)
        if found is not None and fold(module, norm, *found):
            folded += 1
    if folded:
        tidy(module)
    return folded


def norm_affine(module: GraphModule, norm: Node) -> tuple[Node, Affine] | None:
    """Return what a BatchNorm of constants scales and shifts, and by how much; None for any other node."""
    if norm.target != _NORM:
        return None
    read = [argument(norm, place, "", None) for place in range(1, 5)]
    gain, shift, mean, variance = (constant(module, node) for node in read)
    computed = any(node is not None and value is None for node, value in zip(read[:2], (gain, shift), strict=True))
    if argument(norm, 5, "training", True) or mean is None or variance is None or computed:
        return None
    epsilon = float(argument(norm, 7, "eps", 1e-5))
    # In double, as all of the fold is.
    scale = (variance.double() + epsilon).rsqrt() * (1.0 if gain is None else gain.double())
    moved = (0.0 if shift is None else shift.double()) - mean.double() * scale
    return operand(norm, 0), Affine(factor=scale, shift=moved, axis=1)
