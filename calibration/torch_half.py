"""A torch program in float16 between float32 inputs and outputs, but for the weights that a plan keeps in float32."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from deploykit.calibration.torch_integers import value_of, weighted_nodes
from deploykit.fusion.constants import operand
from deploykit.graph import TRANSPOSED


class Cast(nn.Module):
    """A module of another dtype between float32 inputs and outputs."""

    def __init__(self, inner: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner = inner
        self.dtype = dtype

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Map ``(N, C, H, W)`` float32 to the tuple of outputs in float32."""
        return tuple(output.float() for output in self.inner(images.to(self.dtype)))


_RESTORES = (
    torch.ops.quantized_decomposed.dequantize_per_tensor.default,
    torch.ops.quantized_decomposed.dequantize_per_channel.default,
)


def cast_to_half(module: GraphModule, kept_weights: Iterable[str]) -> Cast:
    """Convert a module to float16, in place, but for the nodes of some weights, which get casts around them.

    Integers stay, and become float16 where they are restored.
    """
    kept_names = {name.removesuffix(TRANSPOSED) for name in kept_weights}
    kept = {node: node.args[1] for node in weighted_nodes(module) if str(operand(node, 1).target) in kept_names}
    floats = {
        str(argument.target): value_of(module, argument).clone()
        for node in kept
        for argument in node.args[1:3]
        if isinstance(argument, Node)
    }
    module.half()
    for target, value in floats.items():
        owner, _, name = target.rpartition(".")
        setattr(module.get_submodule(owner), name, nn.Parameter(value, requires_grad=False))
    for node in module.graph.nodes:
        if node.target in _RESTORES:
            node.kwargs = {**node.kwargs, "out_dtype": torch.float16}
    for node in kept:
        with module.graph.inserting_before(node):
            source = module.graph.call_function(torch.ops.aten.to.dtype, (node.args[0], torch.float32))
        with module.graph.inserting_after(node):
            result = module.graph.call_function(torch.ops.aten.to.dtype, (node, torch.float16))
        node.replace_all_uses_with(result, delete_user_cb=partial(operator.is_not, result))
        node.update_arg(0, source)
    module.recompile()
    return Cast(module, torch.float16)
