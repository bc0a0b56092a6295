"""mean over height and width -> mean that keeps both sides, and a reshape: the delegate pools whole maps only so."""

from __future__ import annotations

import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from torch.fx import GraphModule, Node

_DEQUANTIZE = torch.ops.quantized_decomposed.dequantize_per_tensor.default
_QUANTIZE = torch.ops.quantized_decomposed.quantize_per_tensor.default


def keep_pooled_sides(module: GraphModule) -> None:
    """Rewrite every mean of ``(N, C, H, W)`` to ``(N, C)``, in place.

    A pool whose output is rounded is rounded before the reshape, which changes no value.
    """
    for node in list(module.graph.nodes):
        if not _is_pool(node):
            continue
        with module.graph.inserting_before(node):
            pooled = module.graph.call_function(torch.ops.aten.mean.dim, (node.args[0], [2, 3], True))
            rounding = [user for user in node.users if user.target == _QUANTIZE]
            if rounding and len(node.users) == 1:
                settings = rounding[0].args[1:]
                pooled = module.graph.call_function(_QUANTIZE, (pooled, *settings))
                pooled = module.graph.call_function(_DEQUANTIZE, (pooled, *settings))
            flat = module.graph.call_function(torch.ops.aten.flatten.using_ints, (pooled, 1))
        node.replace_all_uses_with(flat)
        module.graph.erase_node(node)


def _is_pool(node: Node) -> bool:
    """Return whether a node averages the two last of four dimensions and drops them."""
    if node.target != torch.ops.aten.mean.dim or node.kwargs.get("dtype") is not None:
        return False
    _, dims, *keep = node.args
    given = node.meta.get("val")
    if given is None or given.dim() != 2 or (keep and keep[0]) or node.kwargs.get("keepdim"):
        return False
    return isinstance(dims, (list, tuple)) and sorted(dim % 4 for dim in dims if isinstance(dim, int)) == [2, 3]
