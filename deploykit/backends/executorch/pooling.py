"""mean -> mean over the two last of four dimensions, which keeps both, and a reshape: the delegate pools only so.

Means of maps ``(N, C, H, W)``, of maps with the channels last, and of tokens ``(N, T, C)``, each to ``(N, C)``.
"""

from __future__ import annotations

import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from torch import Tensor
from torch.fx import GraphModule, Node

from deploykit.fusion.constants import operand

_ATEN = torch.ops.aten
_DEQUANTIZE = torch.ops.quantized_decomposed.dequantize_per_tensor.default
_QUANTIZE = torch.ops.quantized_decomposed.quantize_per_tensor.default

_TO_MAP: dict[tuple[int, tuple[int, ...]], tuple[int, ...]] = {
    (4, (2, 3)): (),
    (4, (1, 2)): (0, 3, 1, 2),
    (3, (1,)): (0, 2, 1),
}
"""The rank of what is averaged and the dimensions over which, to the permutation that puts these last."""


def keep_pooled_sides(module: GraphModule) -> None:
    """Rewrite every such mean, in place.

    A pool whose output is rounded is rounded before the reshape, which changes no value.
    """
    for node in list(module.graph.nodes):
        order = _order(node)
        if order is None:
            continue
        call = module.graph.call_function
        with module.graph.inserting_before(node):
            source = operand(node, 0)
            if order:
                source = call(_ATEN.permute.default, (source, list(order)))
            if len(order) == 3:
                source = call(_ATEN.unsqueeze.default, (source, 3))
            pooled = call(_ATEN.mean.dim, (source, [2, 3], True))
            rounding = [user for user in node.users if user.target == _QUANTIZE]
            if rounding and len(node.users) == 1:
                settings = rounding[0].args[1:]
                pooled = call(_QUANTIZE, (pooled, *settings))
                pooled = call(_DEQUANTIZE, (pooled, *settings))
            flat = call(_ATEN.flatten.using_ints, (pooled, 1))
        node.replace_all_uses_with(flat)
        module.graph.erase_node(node)


def _order(node: Node) -> tuple[int, ...] | None:
    """Return the permutation that a mean needs to become a pool, empty where it needs none; None: it is no pool."""
    if node.target != _ATEN.mean.dim or node.kwargs.get("dtype") is not None:
        return None
    _, dims, *keep = node.args
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or (keep and keep[0]) or node.kwargs.get("keepdim"):
        return None
    if not isinstance(dims, (list, tuple)):
        return None
    rank = value.dim() + len(dims)
    places = sorted(dim % rank for dim in dims if isinstance(dim, int))
    return _TO_MAP.get((rank, tuple(places)))
