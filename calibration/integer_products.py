"""Layers of rounded values in torch, whose sums are of integers: exact whatever their order, as an engine's are.

A float32 holds every integer up to 2**24, which these sums rarely pass. Sums of rounded floats differ from an engine's
in the last bits, and where one lies next to the middle of two integers it would be rounded to the other one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from deploykit.calibration.fake_quantize import FakeQuantize, FakeQuantizedWeight, along

Call: TypeAlias = Callable[..., Tensor]
"""``(x, weight, bias, *arguments)`` to what a convolution or a linear layer gives."""


class _Steps(torch.autograd.Function):
    """``round(x / s)``; the gradient is straight-through."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return (values / scale).round_()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (scale,) = ctx.saved_tensors
        return gradients[0] / scale, None


class IntegerProducts(nn.Module):
    """A layer that reads what one quantizer rounded.

    Args:
        call: the layer.
        activation: what rounded ``x``.
        weight: what rounds the weight.
        arguments: the rest of the call's.
    """

    def __init__(
        self, call: Call, activation: FakeQuantize, weight: FakeQuantizedWeight, arguments: tuple[Any, ...]
    ) -> None:
        super().__init__()
        self._call, self._arguments = call, arguments
        self._factors = (activation, weight)  # in a tuple, so that their parameters are in the state dict once

    def forward(self, values: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the layer's output of a rounded map and weight."""
        activation, rounded = self._factors
        with torch.no_grad():
            step, steps = activation.scale(), rounded.scales()
        with _in_float32(values):
            integers = _steps(values.float(), step), _steps(weight, along(steps, weight))
            sums = self._call(*integers, None, *self._arguments)
        return _restored(sums, step * _in_outputs(steps, weight), bias, weight)


class IntegerProductsEachCall(nn.Module):
    """A layer that rounds what it reads to uint8, over the range that each image's own values have.

    Args:
        call: the layer.
        weight: what rounds the weight.
        arguments: the rest of the call's.
    """

    def __init__(self, call: Call, weight: FakeQuantizedWeight, arguments: tuple[Any, ...]) -> None:
        super().__init__()
        self._call, self._arguments = call, arguments
        self._factors = (weight,)

    def forward(self, values: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the layer's output of a float map and a rounded weight."""
        values = values.float()
        with torch.no_grad():
            steps = self._factors[0].scales()
            flat = values.reshape(len(values), -1)
            shape = (-1, *[1] * (values.dim() - 1))
            low, high = flat.amin(1).clamp(max=0).reshape(shape), flat.amax(1).clamp(min=0).reshape(shape)
            step = ((high - low) / 255).clamp_min(1e-12)
            zero = (-low / step).round()
            integers = (values / step).round_().add_(zero).clamp_(0, 255).sub_(zero)
        read = values / step
        read = read + (integers - read).detach()
        with _in_float32(values):
            sums = self._call(read, _steps(weight, along(steps, weight)), None, *self._arguments)
        return _restored(sums, step * _in_outputs(steps, weight), bias, weight)


def _in_float32(values: Tensor) -> torch.autocast:
    """Return a context in which no layer is cast: float16 holds integers to 2048, and none beyond 65504."""
    return torch.autocast(values.device.type, enabled=False)


def _steps(values: Tensor, scale: Tensor) -> Tensor:
    steps: Tensor = _Steps.apply(values, scale)  # type: ignore[no-untyped-call]
    return steps


def _in_outputs(channels: Tensor, weight: Tensor) -> Tensor:
    """Return ``(channels,)`` in a shape that goes with a layer's output: a map's come second, a linear layer's last."""
    return channels.reshape(-1, *[1] * (weight.dim() - 2))


def _restored(sums: Tensor, steps: Tensor, bias: Tensor | None, weight: Tensor) -> Tensor:
    """Return sums of integers in their steps, and the bias added."""
    products = sums * steps
    return products if bias is None else products + _in_outputs(bias, weight)
