"""Conv(Pad(x, p), padding=q) -> Conv(x, padding=p + q), for zeros that are the same on both sides of an axis."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.fx import GraphModule, Node

from deploykit.fusion.constants import argument, operand, readers, tidy
from deploykit.fusion.convolution_settings import PLAIN, ConvolutionSettings, bias_of, set_convolution, settings_of

_aten = torch.ops.aten
_PADS = (_aten.pad.default, _aten.constant_pad_nd.default)


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


def is_zero_pad(node: Node) -> bool:
    """Return whether a node puts zeros around its map."""
    if node.target == _aten.pad.default:
        return argument(node, 2, "mode", "constant") == "constant" and not argument(node, 3, "value", None)
    return node.target == _aten.constant_pad_nd.default and not argument(node, 2, "value", 0)


def _fold(module: GraphModule, pad: Node) -> bool:
    layers, amounts = readers(pad, tuple(PLAIN)), _amounts(pad)
    if layers is None or amounts is None:
        return False
    settings = [_padded(layer, amounts) for layer in layers]
    if any(value is None for value in settings):
        return False
    for layer, value in zip(layers, settings, strict=True):
        assert value is not None  # noqa: S101  (checked above; narrows the type)
        set_convolution(layer, operand(pad, 0), bias_of(layer), value)
    module.graph.erase_node(pad)
    return True


def _amounts(pad: Node) -> list[int] | None:
    """Zeros on each side of each spatial axis, the last axis first; None where the pad is no such padding."""
    sides = argument(pad, 1, "pad", None)
    whole = isinstance(sides, (list, tuple)) and all(isinstance(side, int) and side >= 0 for side in sides)
    if not is_zero_pad(pad) or not whole or sides[::2] != sides[1::2]:
        return None
    return list(sides[::2])


def _padded(layer: Node, amounts: list[int]) -> ConvolutionSettings | None:
    old = settings_of(layer)
    if old is None or argument(layer, 4, "padding", 0) == "same" or any(amounts[len(old.padding) :]):
        return None
    axes = len(old.padding)
    added = [*amounts[:axes], *[0] * (axes - len(amounts))][::-1]
    return replace(old, padding=tuple(one + other for one, other in zip(old.padding, added, strict=True)))
