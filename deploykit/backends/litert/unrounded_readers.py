"""Q(move(x)) with the steps s -> Q(2 * move(x)) with 2 * s, where something else reads move(x) in float.

LiteRT's converter rounds before what moves numbers, such as a permutation or the reshape behind a LayerNorm, and then
lets its float readers read the rounded numbers too: the residual path behind ConvNeXt's stem loses 30 dB. It rounds
before no product. Twice the numbers in twice the steps are the same integers, and the convolutions that read them have
half the scales.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.fx import GraphModule, Node

from deploykit.calibration.torch_integers import add_constant, value_of
from deploykit.fusion.affine import PERMUTATIONS, RESHAPES
from deploykit.fusion.constants import operand

_ATEN, _DECOMPOSED = torch.ops.aten, torch.ops.quantized_decomposed
_MOVED = frozenset({*RESHAPES, *PERMUTATIONS})
_ENDS_IN_RESHAPE = frozenset({_ATEN.layer_norm.default, _ATEN.linear.default})


def keep_unrounded(module: GraphModule) -> None:
    """Rewrite every such rounding that convolutions alone read, in place."""
    for rounded in module.graph.find_nodes(op="call_function", target=_DECOMPOSED.quantize_per_tensor.default):
        layers = [reader for restored in rounded.users for reader in restored.users]
        if _is_shared(operand(rounded, 0)) and all(_is_layer(layer) for layer in layers):
            _double(module, rounded, layers)


def _is_shared(source: Node) -> bool:
    """Return whether a rounding's source has other readers, before or behind what the converter rounds before."""
    shared = False
    for node in _moved(source):
        shared = shared or len(node.users) > 1
    return shared


def _moved(source: Node) -> Iterator[Node]:
    """Yield what moves numbers in front of a rounding, back to what computes them where that ends in a reshape."""
    while source.target in _MOVED:
        yield source
        source = operand(source, 0)
    if source.target in _ENDS_IN_RESHAPE:
        yield source


def _is_layer(node: Node) -> bool:
    weight = node.args[1] if node.target == _ATEN.conv2d.default else None
    return isinstance(weight, Node) and weight.target == _DECOMPOSED.dequantize_per_channel.default


def _double(module: GraphModule, rounded: Node, layers: list[Node]) -> None:
    source, step, *settings = rounded.args
    with module.graph.inserting_before(rounded):
        twice = module.graph.call_function(_ATEN.mul.Tensor, (source, 2.0))
    rounded.args = (twice, 2 * float(str(step)), *settings)
    for restored in list(rounded.users):
        restored.update_arg(1, 2 * float(str(step)))
    for layer in layers:
        weight = operand(layer, 1)
        weight.update_arg(1, add_constant(module, weight, "halved", value_of(module, operand(weight, 1)) / 2))
