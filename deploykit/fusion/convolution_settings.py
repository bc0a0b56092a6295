"""Read and write the settings of a convolution call: stride, padding and dilation as one number per spatial axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from deploykit.fusion.constants import Target, argument, operand, shape_of

_aten = torch.ops.aten
PLAIN: dict[object, Target] = {
    _aten.conv1d.default: _aten.conv1d.default,
    _aten.conv2d.default: _aten.conv2d.default,
    _aten.conv3d.default: _aten.conv3d.default,
    _aten.conv1d.padding: _aten.conv1d.default,
    _aten.conv2d.padding: _aten.conv2d.default,
    _aten.conv3d.padding: _aten.conv3d.default,
}
"""Maps each convolution to its form with padding in numbers."""


@dataclass(frozen=True, kw_only=True)
class ConvolutionSettings:
    """One number per spatial axis; ``padding`` counts zeros on each side."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


def settings_of(layer: Node) -> ConvolutionSettings | None:
    """Return the settings of one of `PLAIN`; None where 'same' pads the two sides of an axis unequally."""
    axes = len(shape_of(layer)) - 2
    dilation = _each_axis(argument(layer, 5, "dilation", 1), axes)
    padding = argument(layer, 4, "padding", 0)
    if padding == "same":
        sides = [int(side) for side in shape_of(operand(layer, 1))[2:]]
        both = [step * (side - 1) for step, side in zip(dilation, sides, strict=True)]
        if any(zeros % 2 for zeros in both):
            return None
        padding = [zeros // 2 for zeros in both]
    return ConvolutionSettings(
        stride=_each_axis(argument(layer, 3, "stride", 1), axes),
        padding=_each_axis(0 if padding == "valid" else padding, axes),
        dilation=dilation,
        groups=int(argument(layer, 6, "groups", 1)),
    )


def set_convolution(layer: Node, source: Node, bias: Node | None, settings: ConvolutionSettings) -> None:
    """Let a convolution read ``source`` and ``bias``, with these settings; its weight stays."""
    layer.target = PLAIN[layer.target]
    layer.args = (
        source,
        layer.args[1],
        bias,
        list(settings.stride),
        list(settings.padding),
        list(settings.dilation),
        settings.groups,
    )
    layer.kwargs = {}


def bias_of(layer: Node) -> Node | None:
    """Return the node that a layer reads its bias from."""
    bias: Node | None = argument(layer, 2, "bias", None)
    return bias


def _each_axis(value: int | Sequence[int], axes: int) -> tuple[int, ...]:
    numbers = [value] if isinstance(value, int) else list(value)
    return tuple(numbers if len(numbers) == axes else numbers * axes)
