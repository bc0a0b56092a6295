"""Conv(x, w) -> the sum of Conv(x, w at every second place): depthwise kernels of no more places than XNNPACK has.

Its depthwise kernels have up to 25 places. A larger one, as ConvNeXt's 7x7 (Liu et al. 2022), is computed as a
convolution with as many groups as channels, in float and in int8, which takes several times as long. Its even and odd
rows and columns are four convolutions with twice the dilation, padded alike on both sides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import product

import onnx_ir as ir
import torch
from torch.fx import GraphModule, Node

from deploykit.calibration.plan import QuantizationPlan
from deploykit.calibration.torch_integers import value_of, weighted_nodes
from deploykit.fusion.constants import add_constant, argument, operand
from deploykit.onnx_values import sizes_of_constant

_ATEN = torch.ops.aten
MOST_PLACES = 25
_REASON = f"XNNPACK has no depthwise kernel of more than {MOST_PLACES} places"


def keep_large_kernels(model: ir.Model, plan: QuantizationPlan) -> Mapping[str, str]:
    """Choose the depthwise convolutions that `split_kernels` splits: parts of a sum are not rounded alone."""
    return {
        str(node.name): _REASON
        for node in model.graph
        if node.op_type == "Conv" and node.name in plan.placement.weights and _is_planned_large(node)
    }


def _is_planned_large(node: ir.Node) -> bool:
    steps = [*node.attributes.get_ints("strides", ()), *node.attributes.get_ints("dilations", ())]
    return _is_large(sizes_of_constant(node.inputs[1])) and set(steps) <= {1}


def split_kernels(module: GraphModule) -> int:
    """Split every large depthwise convolution of stride 1 with symmetric padding, in place; return how many."""
    nodes = [node for node in weighted_nodes(module) if _is_split(module, node)]
    for node in nodes:
        _split(module, node)
    return len(nodes)


def _is_large(sizes: tuple[int, ...]) -> bool:
    return len(sizes) == 4 and sizes[1] == 1 and math.prod(sizes[2:]) > MOST_PLACES


def _is_split(module: GraphModule, node: Node) -> bool:
    if node.target != _ATEN.conv2d.default:
        return False
    shape = tuple(value_of(module, operand(node, 1)).shape)
    high, wide = argument(node, 4, "padding", [0, 0])
    plain = all(side == 1 for name, at in (("stride", 3), ("dilation", 5)) for side in argument(node, at, name, [1, 1]))
    same = [2 * pad + 1 for pad in (high, wide)] == list(shape[2:])
    return _is_large(shape) and argument(node, 6, "groups", 1) == shape[0] and plain and same


def _split(module: GraphModule, node: Node) -> None:
    source, weight, bias = operand(node, 0), value_of(module, operand(node, 1)), argument(node, 2, "bias", None)
    call, groups, total = module.graph.call_function, weight.shape[0], None
    for row, column in product(range(2), range(2)):
        part = weight[:, :, row::2, column::2].contiguous()
        constant = add_constant(module, f"{node.name}_part_{row}{column}", part)
        padding = [size - 1 for size in part.shape[2:]]
        with module.graph.inserting_before(node):
            layer = call(_ATEN.conv2d.default, (source, constant, bias, [1, 1], padding, [2, 2], groups))
            total = layer if total is None else call(_ATEN.add.Tensor, (total, layer))
        bias = None
    assert total is not None  # noqa: S101  (of four parts; narrows the type)
    node.replace_all_uses_with(total)
    module.graph.erase_node(node)
