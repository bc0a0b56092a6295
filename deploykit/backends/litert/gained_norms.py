"""linear(norm(x) * g) -> linear((x - mean) * (g * rsqrt(variance + eps))): a gain that LiteRT's converter leaves there.

Left beside the linear, the converter multiplies the gain into the weight, whose integers are then the plan's no more.
Equalization gives norms such gains.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from deploykit.fusion.constants import argument, operand

_ATEN = torch.ops.aten


def keep_gains(module: GraphModule) -> None:
    """Rewrite every LayerNorm over the last dimension that has a gain, in place, behind which planned linears stand."""
    for node in module.graph.find_nodes(op="call_function", target=_ATEN.layer_norm.default):
        gain, shift = argument(node, 2, "weight", None), argument(node, 3, "bias", None)
        if gain is None or len(argument(node, 1, "normalized_shape", ())) != 1 or not _is_read_in_integers(node):
            continue
        call, source, eps = module.graph.call_function, operand(node, 0), argument(node, 4, "eps", 1e-5)
        with module.graph.inserting_before(node):
            centred = call(_ATEN.sub.Tensor, (source, call(_ATEN.mean.dim, (source, [-1], True))))
            square = call(_ATEN.mul.Tensor, (centred, centred))
            variance = call(_ATEN.add.Tensor, (call(_ATEN.mean.dim, (square, [-1], True)), eps))
            factor = call(_ATEN.mul.Tensor, (call(_ATEN.rsqrt.default, (variance,)), gain))
            normed = call(_ATEN.mul.Tensor, (centred, factor))
            if shift is not None:
                normed = call(_ATEN.add.Tensor, (normed, shift))
        node.replace_all_uses_with(normed)
        module.graph.erase_node(node)


def _is_read_in_integers(norm: Node) -> bool:
    """Return whether a linear with the plan's integers reads a norm."""
    restore = torch.ops.quantized_decomposed.dequantize_per_channel.default
    linears = [user for user in norm.users if user.target == _ATEN.linear.default]
    return any(operand(linear, 1).target == restore for linear in linears)
