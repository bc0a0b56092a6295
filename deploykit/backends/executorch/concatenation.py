"""Q(cat(DQ(a), DQ(b))) -> Q(cat(DQ(Q(DQ(a))), DQ(Q(DQ(b))))): parts in the steps of the whole.

The delegate joins integers of one scale and zero point alone. The numbers stay: each is rounded to the whole's steps
before it is joined, and not behind.
"""

from __future__ import annotations

import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from torch.fx import GraphModule, Node

_QUANTIZE = torch.ops.quantized_decomposed.quantize_per_tensor.default
_DEQUANTIZE = torch.ops.quantized_decomposed.dequantize_per_tensor.default


def round_parts(module: GraphModule) -> None:
    """Rewrite every concatenation of integers whose only reader rounds it to other steps than a part has, in place."""
    for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default):
        reader = next(iter(node.users)) if len(node.users) == 1 else node
        parts = node.all_input_nodes
        if reader.target != _QUANTIZE or any(part.target != _DEQUANTIZE for part in parts):
            continue
        for part in parts:
            if part.args[1:] != reader.args[1:]:
                node.replace_input_with(part, _rounded(module, node, part, reader))


def _rounded(module: GraphModule, node: Node, part: Node, reader: Node) -> Node:
    with module.graph.inserting_before(node):
        integers = module.graph.call_function(_QUANTIZE, (part, *reader.args[1:]))
        return module.graph.call_function(_DEQUANTIZE, (integers, *reader.args[1:]))
