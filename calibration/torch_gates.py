"""Gates of a torch program with a plan, in integers: a gate lies between 0 and 1 and needs no measured range.

- ``silu(DQ(x)) -> DQ(x) * sigmoid(DQ(x))``, where what it gives is rounded.
- ``DQ(x) * sigmoid(y) -> DQ(x) * DQ(Q(sigmoid(y)))``, where the product is rounded; the same for a hard sigmoid.
- ``hardsigmoid(DQ(Q(Conv(x, w, b)))) -> DQ(Q(Conv(x, w / 6, b / 6 + 1/2)))``: rounding from 0 to 1 is the clip. The
  integers of ``w`` stay, and its scales are divided.

A product with a float gate restores a whole map, and rounds it again.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from torch.fx import GraphModule, Node

from deploykit.calibration.torch_integers import add_constant, value_of
from deploykit.fusion.constants import operand

_ATEN = torch.ops.aten
_QUANTIZE = torch.ops.quantized_decomposed.quantize_per_tensor.default
_RESTORE = torch.ops.quantized_decomposed.dequantize_per_tensor.default
_RESTORE_WEIGHT = torch.ops.quantized_decomposed.dequantize_per_channel.default
_SIGMOID, _HARD_SIGMOID = _ATEN.sigmoid.default, _ATEN.hardsigmoid.default

Steps: TypeAlias = tuple[float, int, int, int, torch.dtype]
"""Scale, zero point, least and largest integer and dtype, as Q/DQ operators take them."""

_STEPS: dict[object, Steps] = {
    _SIGMOID: (1 / 256, -128, -128, 127, torch.int8),
    _HARD_SIGMOID: (1 / 255, -128, -128, 127, torch.int8),
}
"""A sigmoid is below 1; the steps are those that LiteRT fixes for it. A hard one reaches 1."""
_SLOPE, _MIDDLE = 1 / 6, 0.5


def write_integer_gates(module: GraphModule) -> None:
    """Rewrite the gates above, in place, in a module with a plan's Q/DQ pairs."""
    for node in list(module.graph.nodes):
        if node.target == _ATEN.silu.default and _is_restored(node.args[0]) and _is_rounded(node):
            _split_silu(node)
        elif node.target == _HARD_SIGMOID:
            _fold_hard_sigmoid(module, node)
    for product in module.graph.find_nodes(op="call_function", target=_ATEN.mul.Tensor):
        gates = [factor for factor in product.all_input_nodes if factor.target in _STEPS]
        if len(gates) == 1 and _is_rounded(product) and any(map(_is_restored, product.args)):
            _round(gates[0], product)


def _is_restored(node: object) -> bool:
    return isinstance(node, Node) and node.target == _RESTORE


def _is_rounded(node: Node) -> bool:
    """Return whether all that read a node round it."""
    return bool(node.users) and all(user.target == _QUANTIZE for user in node.users)


def _split_silu(node: Node) -> None:
    call, restored = node.graph.call_function, operand(node, 0)
    with node.graph.inserting_before(node):
        gate = call(_SIGMOID, (call(_RESTORE, restored.args),))
        product = call(_ATEN.mul.Tensor, (restored, gate))
    node.replace_all_uses_with(product)
    node.graph.erase_node(node)


def _round(gate: Node, product: Node) -> None:
    """Let a product read a gate rounded."""
    steps = _STEPS[gate.target]
    with product.graph.inserting_before(product):
        integers = product.graph.call_function(_QUANTIZE, (gate, *steps))
        restored = product.graph.call_function(_RESTORE, (integers, *steps))
    product.replace_input_with(gate, restored)


def _fold_hard_sigmoid(module: GraphModule, gate: Node) -> None:
    """Let the convolution in front of a hard sigmoid round to the gate itself, where nothing else reads it."""
    restored = operand(gate, 0)
    integers = restored.args[0] if restored.target == _RESTORE else None
    if not isinstance(integers, Node) or integers.target != _QUANTIZE:
        return
    layer = operand(integers, 0)
    weight = layer.args[1] if layer.target == _ATEN.conv2d.default else None
    alone = all(len(node.users) == 1 for node in (layer, integers, restored, gate))
    if not isinstance(weight, Node) or weight.target != _RESTORE_WEIGHT or not alone:
        return
    scales = value_of(module, operand(weight, 1))
    bias = value_of(module, operand(layer, 2)) if len(layer.args) > 2 and layer.args[2] is not None else None
    shifted = bias * _SLOPE + _MIDDLE if bias is not None else torch.full((len(scales),), _MIDDLE)
    weight.update_arg(1, add_constant(module, weight, "gate", scales * _SLOPE))
    layer.args = (*layer.args[:2], add_constant(module, layer, "gate_bias", shifted), *layer.args[3:])
    integers.args = (layer, *_STEPS[_HARD_SIGMOID])
    restored.args = (integers, *_STEPS[_HARD_SIGMOID])
    gate.replace_all_uses_with(restored)
    gate.graph.erase_node(gate)
