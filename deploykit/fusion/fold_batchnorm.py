"""BatchNorm(Conv(x)) -> Conv'(x): w' = w * s and b' = (b - mean) * s + beta, with s = gamma / sqrt(var + eps)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

_CONVOLUTIONS = (torch.ops.aten.conv2d.default, torch.ops.aten.conv2d.padding)


def fold_batchnorm(module: GraphModule) -> int:
    """Fold every inference BatchNorm whose input is a convolution that nothing else reads.

    Works on the flat graph of a `torch.export` program in eval mode, in place; exact in real
    arithmetic. A convolution whose weight is shared, a BatchNorm in training mode and one whose
    input is used elsewhere are left alone.

    Returns:
        How many were folded.
    """
    uses: dict[str, int] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            uses[node.target] = uses.get(node.target, 0) + len(node.users)
    folded = 0
    for norm in list(module.graph.find_nodes(op="call_function", target=torch.ops.aten.batch_norm.default)):
        convolution = norm.args[0]
        if _foldable(norm, convolution, uses):
            _fold(module, convolution, norm)
            folded += 1
    if folded:
        module.graph.eliminate_dead_code()
        module.delete_all_unused_submodules()
        module.recompile()
    return folded


def _foldable(norm: Node, convolution: Any, uses: dict[str, int]) -> bool:
    if not isinstance(convolution, Node) or convolution.target not in _CONVOLUTIONS or len(convolution.users) != 1:
        return False
    training = norm.args[5]
    parameters = [*norm.args[1:5], *convolution.args[1:3]]
    constant = all(value is None or (isinstance(value, Node) and value.op == "get_attr") for value in parameters)
    weight = convolution.args[1]
    shared = isinstance(weight, Node) and uses.get(str(weight.target), 0) != 1
    return training is False and constant and not shared and norm.args[3] is not None


def _fold(module: GraphModule, convolution: Node, norm: Node) -> None:
    weight_node = convolution.args[1]
    assert isinstance(weight_node, Node)  # noqa: S101  (checked by _foldable; narrows the type)
    weight = _value(module, weight_node)
    bias = _value(module, convolution.args[2] if len(convolution.args) > 2 else None)
    gain, shift, mean, variance = (_value(module, argument) for argument in norm.args[1:5])
    epsilon = norm.args[7]
    # In double: the product of two rounded factors would lose a bit that FP32 parity sees.
    scale = (variance.double() + epsilon).rsqrt() * (1.0 if gain is None else gain.double())
    folded_weight = weight.double() * scale.reshape(-1, *[1] * (weight.dim() - 1))
    folded_bias = ((0.0 if bias is None else bias.double()) - mean.double()) * scale
    folded_bias = folded_bias + (0.0 if shift is None else shift.double())

    owner, _, _ = str(weight_node.target).rpartition(".")
    holder = module.get_submodule(owner)
    holder.weight = nn.Parameter(folded_weight.to(weight.dtype), requires_grad=False)
    holder.bias = nn.Parameter(folded_bias.to(weight.dtype), requires_grad=False)
    with module.graph.inserting_before(convolution):
        bias_node = module.graph.get_attr(f"{owner}.bias")
    convolution.args = (convolution.args[0], weight_node, bias_node, *convolution.args[3:])
    norm.replace_all_uses_with(convolution)
    module.graph.erase_node(norm)


def _value(module: GraphModule, node: Any) -> Any:
    """The tensor behind a ``get_attr`` node, or None."""
    if node is None:
        return None
    owner, _, name = str(node.target).rpartition(".")
    return getattr(module.get_submodule(owner), name)
