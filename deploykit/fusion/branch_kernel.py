"""Kernels of parallel branches: K1 * x + K2 * x = (K1 + K2) * x, both padded with zeros to their union."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from deploykit.fusion.affine import Affine
from deploykit.fusion.constants import Size, add_constant, constant, operand, set_constant
from deploykit.fusion.convolution_settings import ConvolutionSettings, bias_of, set_convolution, settings_of


@dataclass(frozen=True, kw_only=True)
class BranchKernel:
    """A convolution in double: ``weight`` ``(O, I / groups, *kernel)`` and ``bias`` ``(O,)``."""

    weight: Tensor
    bias: Tensor
    settings: ConvolutionSettings

    @property
    def sides(self) -> tuple[int, ...]:
        """The kernel's sides."""
        return tuple(self.weight.shape[2:])

    @property
    def taps(self) -> int:
        """Products per output value and input channel."""
        return math.prod(self.sides)

    def reach(self, axis: int) -> int:
        """How much wider the padded map is than the kernel's span beyond one tap, which decides the output's size."""
        return 2 * self.settings.padding[axis] - self.settings.dilation[axis] * (self.sides[axis] - 1)

    def scaled(self, factor: float) -> BranchKernel:
        """Return the kernel of ``factor`` times the branch."""
        return replace(self, weight=self.weight * factor, bias=self.bias * factor)


@dataclass(frozen=True, kw_only=True)
class _Axis:
    """One axis of a merged kernel: its side, and how far in each of the two kernels begins."""

    side: int
    padding: int
    dilation: int
    starts: tuple[int, int]


def kernel_of(module: GraphModule, layer: Node) -> BranchKernel | None:
    """Return the kernel of a convolution with constant weights; None where its sides are not padded alike."""
    weight, settings, bias = constant(module, layer.args[1]), settings_of(layer), constant(module, bias_of(layer))
    if weight is None or settings is None:
        return None
    shift = torch.zeros(len(weight), dtype=torch.double) if bias is None else bias.double()
    return BranchKernel(weight=weight.double(), bias=shift, settings=settings)


def identity_kernel(affine: Affine, like: BranchKernel) -> BranchKernel | None:
    """Return ``x * factor + shift`` as a 1x1 kernel in the groups of another; None where that strides or widens."""
    outputs, width = like.weight.shape[:2]
    groups, axes = like.settings.groups, len(like.sides)
    if outputs != width * groups or any(step != 1 for step in like.settings.stride):
        return None
    weight = torch.zeros(outputs, width, dtype=torch.double)
    weight[torch.arange(outputs), torch.arange(outputs) % width] = affine.factor.expand(outputs)
    ones = (1,) * axes
    settings = ConvolutionSettings(stride=ones, padding=(0,) * axes, dilation=ones, groups=groups)
    return BranchKernel(
        weight=weight.reshape(outputs, width, *ones), bias=affine.shift.expand(outputs), settings=settings
    )


def merged(
    one: BranchKernel, other: BranchKernel, read: Sequence[Size], written: Sequence[Size]
) -> BranchKernel | None:
    """Return the kernel of the sum of two branches of one input.

    Args:
        one: the first.
        other: the second.
        read: sides of the map that both read.
        written: sides of the map that both write.

    Returns:
        None where strides, groups or dilations differ, the kernels have no common grid, or the merged one would have
        more taps than both.
    """
    if one.weight.shape[:2] != other.weight.shape[:2]:
        return None
    if (one.settings.stride, one.settings.groups) != (other.settings.stride, other.settings.groups):
        return None
    axes = [_axis(one, other, axis) for axis in range(len(one.sides))]
    known = [axis for axis in axes if axis is not None]
    if len(known) < len(axes) or math.prod(axis.side for axis in known) > one.taps + other.taps:
        return None
    for place, axis in enumerate(known):
        reach = 2 * axis.padding - axis.dilation * (axis.side - 1)
        if reach not in (one.reach(place), other.reach(place)):
            before, after = read[place], written[place]
            if not isinstance(before, int) or (before + reach - 1) // one.settings.stride[place] + 1 != after:
                return None
    weight = torch.zeros(*one.weight.shape[:2], *(axis.side for axis in known), dtype=torch.double)
    for index, kernel in enumerate((one, other)):
        slots = [
            slice(axis.starts[index], axis.starts[index] + side) for axis, side in zip(known, kernel.sides, strict=True)
        ]
        weight[(slice(None), slice(None), *slots)] += kernel.weight
    settings = replace(
        one.settings,
        padding=tuple(axis.padding for axis in known),
        dilation=tuple(axis.dilation for axis in known),
    )
    return BranchKernel(weight=weight, bias=one.bias + other.bias, settings=settings)


def _axis(one: BranchKernel, other: BranchKernel, axis: int) -> _Axis | None:
    sides = (one.sides[axis], other.sides[axis])
    paddings = (one.settings.padding[axis], other.settings.padding[axis])
    steps = {kernel.settings.dilation[axis] for kernel in (one, other) if kernel.sides[axis] > 1} or {1}
    padding = max(paddings)
    (dilation,) = steps if len(steps) == 1 else (0,)
    if not dilation or any((padding - own) % dilation for own in paddings):
        return None
    first, second = ((padding - own) // dilation for own in paddings)
    side = max(first + sides[0], second + sides[1])
    return _Axis(side=side, padding=padding, dilation=dilation, starts=(first, second))


def write_kernel(module: GraphModule, layer: Node, kernel: BranchKernel) -> bool:
    """Put a kernel into a convolution, in its weights' own precision; False where a number would overflow."""
    stored = constant(module, layer.args[1])
    assert stored is not None  # noqa: S101  (of a branch; narrows the type)
    source = operand(layer, 1)
    weight, shift = kernel.weight.to(stored.dtype), kernel.bias.to(stored.dtype)
    if not bool(torch.isfinite(weight).all() and torch.isfinite(shift).all()):
        return False
    set_constant(module, source, weight)
    bias = bias_of(layer)
    if bias is not None:
        set_constant(module, bias, shift)
    elif bool((shift != 0).any()):
        owner = str(source.target).rpartition(".")[0]
        bias = add_constant(module, f"{owner}.bias" if owner else "bias", shift)
    set_convolution(layer, operand(layer, 0), bias, kernel.settings)
    return True
