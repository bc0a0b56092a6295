"""softmax(q @ k^T * s + bias) @ v -> scaled_dot_product_attention(q, k, v, bias, scale=s), in its usual spellings.

The scale may stand on the queries, the keys or the scores, as a product or a quotient; the bias may be
added, or be a constant mask that fills with -inf.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch.fx import GraphModule, Node

from deploykit.fusion.affine import PERMUTATIONS, permutation
from deploykit.fusion.constants import (
    ATTENTION,
    add_call,
    add_constant,
    argument,
    constant,
    operand,
    scalar,
    shape_of,
    sizes,
    tidy,
)
from deploykit.fusion.constants import replace as replace_node
from deploykit.fusion.shape_chains import sources

_aten = torch.ops.aten
_PRODUCTS = (_aten.matmul.default, _aten.bmm.default)
_SOFTMAX = (_aten.softmax.int, _aten._softmax.default)
_FILLS = (_aten.masked_fill.Scalar, _aten.masked_fill.Tensor)
_AS_GOOD_AS_MINUS_INFINITY = -1e30


@dataclass(frozen=True, kw_only=True)
class _Scores:
    """What a softmax reads: ``product * scale + bias``, kept where ``mask`` is true."""

    product: Node
    scale: float = 1.0
    bias: Node | None = None
    mask: torch.Tensor | None = None


def fuse_attention(module: GraphModule) -> int:
    """Write attention that is spelled out as one operator.

    Works on maps ``(N, heads, T, D)``. Exact in real arithmetic. Left alone: a softmax over another
    axis, scores or probabilities that something else reads, a factor outside the bias, a mask that is
    computed from the images or leaves a query nothing to attend to, and maps of another rank.

    Returns:
        How many attentions were written.
    """
    fused = sum(_fuse(module, product) for target in _PRODUCTS for product in sources(module, target))
    if fused:
        tidy(module)
    return fused


def _fuse(module: GraphModule, product: Node) -> bool:
    probabilities, value = product.args[:2]
    if not isinstance(probabilities, Node) or not isinstance(value, Node) or not _read_once(probabilities, _SOFTMAX):
        return False
    scores, axis = probabilities.args[:2]
    rank = len(shape_of(probabilities))
    if rank != 4 or axis not in (-1, rank - 1) or argument(probabilities, 2, "dtype", None):
        return False
    parts = _parts(module, scores)
    if parts is None:
        return False
    query, query_scale = _unscaled(module, parts.product.args[0])
    key, key_scale, transposed = _keys(module, parts.product.args[1])
    if not all(_same_heads(node, value) for node in (query, key)):
        return False
    mask = parts.bias
    if parts.mask is not None:
        mask = add_constant(module, f"constants.{probabilities.name}_mask", parts.mask)
    if not transposed:
        key = add_call(product, _aten.transpose.int, key, -2, -1)
    scale = parts.scale * query_scale * key_scale
    replace_node(product, add_call(product, ATTENTION, query, key, value, mask, scale=scale))
    return True


def _parts(module: GraphModule, scores: object) -> _Scores | None:
    """Peel mask, bias and scale off the scores, from the outside in."""
    found = _Scores(product=torch.fx.Graph().placeholder("unknown"))
    while isinstance(scores, Node) and len(scores.users) == 1 and scores.op == "call_function":
        if scores.target in _PRODUCTS:
            return replace(found, product=scores)
        step = _mask(module, scores, found) or _bias(module, scores, found) or _scale(module, scores, found)
        if step is None:
            return None
        scores, found = step
    return None


def _mask(module: GraphModule, node: Node, found: _Scores) -> tuple[object, _Scores] | None:
    """Return a constant mask, before any bias or scale; true where a score is kept."""
    if found.bias is not None or found.mask is not None or found.scale != 1.0:
        return None
    if node.target in _FILLS:
        scores, drop, filling = node.args[:3]
        dropped = constant(module, drop)
        keep = None if dropped is None else ~dropped.bool()
    elif node.target in (_aten.where.self, _aten.where.ScalarOther):
        kept, scores, filling = node.args[:3]
        keep = constant(module, kept)
    else:
        return None
    number = scalar(module, filling)
    if keep is None or number is None or number > _AS_GOOD_AS_MINUS_INFINITY or keep.dim() not in (2, 3, 4):
        return None
    attended = keep.bool().any(dim=-1)
    return (scores, replace(found, mask=keep.bool())) if bool(attended.all()) else None


def _bias(module: GraphModule, node: Node, found: _Scores) -> tuple[object, _Scores] | None:
    if node.target != _aten.add.Tensor or argument(node, 3, "alpha", 1) != 1:
        return None
    # torch's attention takes one of the two.
    if found.bias is not None or found.mask is not None or found.scale != 1.0:
        return None
    for scores, bias in (node.args[:2], node.args[1::-1]):
        if not isinstance(scores, Node) or not isinstance(bias, Node) or not _leads_to_product(module, scores):
            continue
        same_type = bias.meta["val"].dtype == scores.meta["val"].dtype
        if same_type and len(shape_of(bias)) in (2, 3, 4) and sizes(scores) == sizes(node):
            return scores, replace(found, bias=bias)
    return None


def _scale(module: GraphModule, node: Node, found: _Scores) -> tuple[object, _Scores] | None:
    source, factor = _unscaled(module, node)
    return None if source is node else (source, replace(found, scale=found.scale * factor))


def _leads_to_product(module: GraphModule, node: Node) -> bool:
    source, _ = _unscaled(module, node)
    return len(node.users) == 1 and source.target in _PRODUCTS


def _unscaled(module: GraphModule, node: object) -> tuple[Node, float]:
    """Return a node without the number that multiplies or divides it, and that number as a factor."""
    assert isinstance(node, Node)  # noqa: S101  (an operand of a matrix product)
    if node.target == _aten.mul.Tensor:
        for source, number in (node.args[:2], node.args[1::-1]):
            factor = scalar(module, number)
            if factor is not None and isinstance(source, Node) and sizes(source) == sizes(node):
                return source, factor
    if node.target == _aten.div.Tensor:
        divisor = scalar(module, node.args[1])
        if divisor and math.isfinite(divisor) and isinstance(node.args[0], Node):
            return node.args[0], 1 / divisor
    return node, 1.0


def _keys(module: GraphModule, node: object) -> tuple[Node, float, bool]:
    """The second operand of the scores without factors and transpositions; the factor; whether it was transposed."""
    scale, transposed = 1.0, False
    while isinstance(node, Node):
        source, factor = _unscaled(module, node)
        scale *= factor
        if source is node and node.target in PERMUTATIONS and permutation(node) == [0, 1, 3, 2]:
            source = operand(node, 0)
            transposed = not transposed
        if source is node:
            break
        node = source
    assert isinstance(node, Node)  # noqa: S101  (an operand of a matrix product)
    return node, scale, transposed


def _read_once(node: Node, targets: tuple[object, ...]) -> bool:
    return node.target in targets and len(node.users) == 1


def _same_heads(node: Node, value: Node) -> bool:
    return len(shape_of(node)) == 4 and sizes(node)[:2] == sizes(value)[:2]
