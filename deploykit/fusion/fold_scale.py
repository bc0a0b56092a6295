"""Linear(w, b)(x) * s + t -> Linear(w * s, b * s + t)(x); Linear(w, b)(x * s + t) -> Linear(w * s, b + sum(w * t))(x).

Layer scale goes into the layer before it, the shift of Global Response Normalization into the one after it.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from deploykit.fusion.affine import Affine, channel_vector, fold
from deploykit.fusion.constants import alike, argument, constant, shape_of, tidy

_aten = torch.ops.aten
_TARGETS = (_aten.mul.Tensor, _aten.div.Tensor, _aten.add.Tensor, _aten.sub.Tensor)


def fold_scale(module: GraphModule) -> int:
    """Fold constant factors and shifts of one value a channel into the linears and convolutions beside them.

    Exact in real arithmetic. Left alone: a tensor that varies along several axes (position
    embeddings), a layer whose raw output is read elsewhere, a shift before a padded convolution.

    Returns:
        How many multiplications, divisions, additions and subtractions went.
    """
    folded = 0
    for node in list(module.graph.nodes):
        found = scale_affine(module, node)
        if found is not None and fold(module, node, *found):
            folded += 1
    if folded:
        tidy(module)
    return folded


def scale_affine(module: GraphModule, node: Node) -> tuple[Node, Affine] | None:
    """Return what a node scales and shifts, and by how much; None where it is no affine map of a channel."""
    if node.target not in _TARGETS:
        return None
    left, right = node.args[:2]
    swapped = not isinstance(left, Node) or constant(module, left) is not None
    source, value = (right, left) if swapped else (left, right)
    if not isinstance(source, Node) or constant(module, source) is not None or not alike(source, node):
        return None
    vector = _vector(module, value, source)
    if vector is None or (swapped and node.target == _aten.div.Tensor):
        return None
    number, axis = vector
    one, zero = torch.ones((), dtype=torch.double), torch.zeros((), dtype=torch.double)
    if node.target == _aten.mul.Tensor:
        return source, Affine(factor=number, shift=zero, axis=axis)
    if node.target == _aten.div.Tensor:
        return source, Affine(factor=1 / number, shift=zero, axis=axis)
    # left + alpha * right, whichever of them is the constant.
    alpha = float(argument(node, 2, "alpha", 1)) * (1 if node.target == _aten.add.Tensor else -1)
    factor, shift = (alpha * one, number) if swapped else (one, alpha * number)
    return source, Affine(factor=factor, shift=shift, axis=axis)


def _vector(module: GraphModule, value: object, source: Node) -> tuple[torch.Tensor, int | None] | None:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return torch.tensor(float(value), dtype=torch.double), None
    tensor = constant(module, value)
    if tensor is None or not tensor.is_floating_point():
        return None
    shape = shape_of(source)
    return channel_vector(tensor, len(shape), shape)
