"""Conv(Pad(x, p), padding=q) -> Conv(x, padding=p + q), for zeros that are the same on both sides of an axis."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from deploykit.fusion.constants import Target, argument, readers, shape_of, tidy

_aten = torch.ops.aten
_PADS = (_aten.pad.default, _aten.constant_pad_nd.default)
_CONVOLUTIONS: dict[object, Target] = {
    _aten.conv1d.default: _aten.conv1d.default,
    _aten.conv2d.default: _aten.conv2d.default,
    _aten.conv3d.default: _aten.conv3d.default,
    _aten.conv1d.padding: _aten.conv1d.default,
    _aten.conv2d.padding: _aten.conv2d.default,
    _aten.conv3d.padding: _aten.conv3d.default,
}


def fold_pad(module: GraphModule) -> int:
    """Fold zero padding into the convolutions that alone read it.

    Exact. Left alone: another value or mode, cropping, padding of the batch or the channels,
    unequal sides (the runtimes fold those: ONNX's Conv has both), and a convolution with 'same'.

    Returns:
        How many paddings went.
    """
    folded = 0
    for target in _PADS:
        for pad in module.graph.find_nodes(op="call_function", target=target):
            folded += _fold(module, pad)
    if folded:
        tidy(module)
    return folded


def _fold(module: GraphModule, pad: Node) -> bool:
    layers, amounts = readers(pad, tuple(_CONVOLUTIONS)), _amounts(pad)
    if layers is None or amounts is None:
        return False
    padding = [_padding(layer, amounts) for layer in layers]
    if any(value is None for value in padding):
        return False
    for layer, value in zip(layers, padding, strict=True):
        assert value is not None  # noqa: S101  (checked above; narrows the type)
        layer.target = _CONVOLUTIONS[layer.target]
        ones = [1] * len(value)
        stride = argument(layer, 3, "stride", ones)
        rest = (argument(layer, 5, "dilation", ones), argument(layer, 6, "groups", 1))
        layer.args = (pad.args[0], layer.args[1], argument(layer, 2, "bias", None), stride, value, *rest)
        layer.kwargs = {}
    module.graph.erase_node(pad)
    return True


def _amounts(pad: Node) -> list[int] | None:
    """Zeros on each side of each spatial axis, the last axis first; None where the pad is no such padding."""
    if pad.target == _aten.pad.default:
        zeros = argument(pad, 2, "mode", "constant") == "constant" and not argument(pad, 3, "value", None)
    else:
        zeros = not argument(pad, 2, "value", 0)
    sides = argument(pad, 1, "pad", None)
    whole = isinstance(sides, (list, tuple)) and all(isinstance(side, int) and side >= 0 for side in sides)
    if not zeros or not whole or sides[::2] != sides[1::2]:
        return None
    return list(sides[::2])


def _padding(layer: Node, amounts: list[int]) -> list[int] | None:
    axes = len(shape_of(layer)) - 2
    old = argument(layer, 4, "padding", 0)
    if old == "same" or any(amounts[axes:]):
        return None
    start = [0] * axes if old == "valid" else [old] * axes if isinstance(old, int) else list(old)
    start = start * axes if len(start) == 1 else start
    added = [*amounts[:axes], *[0] * (axes - len(amounts))][::-1]
    return [one + other for one, other in zip(start, added, strict=True)]
