"""Q(relu(batch_norm(DQ(x)))) -> Q(relu(Conv(DQ(x), DQ(w), shift))): a norm between integers as a depthwise convolution.

A norm that no convolution stands before, as in a ResNet v2 (He et al. 2016), is a factor and a shift for each channel.
A weight of 127 or -127 whose scale has the factor's size is that factor, to the bit. LiteRT's converter would restore
the map and write four float operators.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from deploykit.calibration.torch_integers import value_of
from deploykit.fusion.constants import add_constant, operand

_ATEN, _DECOMPOSED = torch.ops.aten, torch.ops.quantized_decomposed
_LARGEST, _LARGEST_BIAS = 127, 2**30


def write_integer_norms(module: GraphModule) -> None:
    """Rewrite every such BatchNorm of a module with a plan's Q/DQ pairs, in place."""
    for node in module.graph.find_nodes(op="call_function", target=_ATEN.batch_norm.default):
        source = operand(node, 0)
        if source.target != _DECOMPOSED.dequantize_per_tensor.default or not _is_rounded(node):
            continue
        factor, shift = _affine(module, node)
        scales = _scales(factor, shift, float(str(source.args[1])))
        integers = (factor / scales).round().to(torch.int8)[:, None, None, None]
        parts = {"integers": integers, "scales": scales.float(), "zeros": torch.zeros(len(scales), dtype=torch.int64)}
        weight = [add_constant(module, f"{node.name}_{name}", value) for name, value in parts.items()]
        bias = add_constant(module, f"{node.name}_shift", shift.float())
        call, settings = module.graph.call_function, ([1, 1], [0, 0], [1, 1], len(scales))
        with module.graph.inserting_before(node):
            restored = call(_DECOMPOSED.dequantize_per_channel.default, (*weight, 0, -_LARGEST, _LARGEST, torch.int8))
            layer = call(_ATEN.conv2d.default, (source, restored, bias, *settings))
        node.replace_all_uses_with(layer)
        module.graph.erase_node(node)


def _is_rounded(norm: Node) -> bool:
    """Return whether all that a norm gives is rounded, behind a Relu or at once."""
    readers = list(norm.users)
    if len(readers) == 1 and readers[0].target == _ATEN.relu.default:
        readers = list(readers[0].users)
    return bool(readers) and all(user.target == _DECOMPOSED.quantize_per_tensor.default for user in readers)


def _affine(module: GraphModule, norm: Node) -> tuple[Tensor, Tensor]:
    """Return the factor and the shift of each channel, in double."""
    mean, variance = (value_of(module, operand(norm, position)).double() for position in (3, 4))
    gain, bias = (
        value_of(module, each).double() if isinstance(each, Node) else None for each in (norm.args[1], norm.args[2])
    )
    factor = (variance + float(str(norm.args[7]))).rsqrt()
    factor = factor * gain if gain is not None else factor
    return factor, (bias if bias is not None else 0) - mean * factor


def _scales(factor: Tensor, shift: Tensor, step: float) -> Tensor:
    """Return a scale for each channel that its bias, in 32 bits of the scale and of what is read, leaves room for."""
    least = (shift.abs() / (step * _LARGEST_BIAS)).clamp(min=1e-12)
    return torch.maximum(factor.abs() / _LARGEST, least)
