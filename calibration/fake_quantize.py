"""Fake quantizers in torch: values rounded to integers in the forward pass, with gradients for all that decides how.

The gradient of rounding is straight-through, and that of the scale is LSQ's (Esser et al. 2020, "Learned Step
Size Quantization"), of the zero point LSQ+'s (Bhalgat et al. 2020). Scales are learned as logarithms, so that a
step of the optimizer changes each by a share of itself.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from deploykit.calibration.quantize_activations import IntegerType
from deploykit.calibration.ranges import ActivationRange, TensorStatistics, quantize_weight

TOP = 127
LEAST_SHARE = 1e-4
"""The smallest scale of a channel, as a share of the largest: see `quantize_weight`."""
_KEPT_SIDE = 0.49
"""How far from an integer, in steps, a weight starts that the plan rounds to it."""


_GATE = torch.ops.aten.hardtanh_backward
"""``(g, x, least, most)``: g where x is between them, else 0, in one pass over memory."""


_Kind: TypeAlias = tuple[int, int, bool]
"""The least and the largest integer, and whether values between them stay as they are."""


class _RoundTensor(torch.autograd.Function):
    """``(clip(round(x / s) + z, least, most) - z) * s`` with one scale and one zero point; or clipped alone."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, log_scale: Tensor, zero_point: Tensor, kind: _Kind) -> Tensor:
        least, most, clip_only = kind
        scale, zero = log_scale.exp(), zero_point.round().clamp(least, most)
        steps = values / scale
        rounded = (steps if clip_only else steps.round_()).clamp_(least - zero, most - zero).mul_(scale)
        ctx.save_for_backward(values, rounded, scale, zero)
        ctx.bounds = least, most
        return rounded

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (values, rounded, scale, zero) = gradients, ctx.saved_tensors
        least, most = ((bound - zero + half) * scale for bound, half in zip(ctx.bounds, (-0.5, 0.5), strict=True))
        inside = float(least), float(most)
        passed = _GATE(gradient, values, *inside)
        # In steps of the scale, what rounding added inside the bounds and the bound itself outside of them.
        change = _GATE(values, values, *inside).neg_().add_(rounded)
        by_scale = _dot(gradient, change)
        by_zero = scale * (passed.sum() - gradient.sum()) if ctx.needs_input_grad[2] else None
        return passed, by_scale, by_zero, None


class _RoundChannels(torch.autograd.Function):
    """``clip(round(w / s), -127, 127) * s`` with one scale for each channel of axis 0."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, log_scales: Tensor) -> Tensor:
        scales = log_scales.exp()
        steps = along(scales, weight)
        rounded = (weight / steps).round_().clamp_(-TOP, TOP).mul_(steps)
        ctx.save_for_backward(weight, rounded, scales)
        return rounded

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (weight, rounded, scales) = gradients, ctx.saved_tensors
        passed = gradient * (weight.abs() <= (TOP + 0.5) * along(scales, weight))
        by_scale = None
        if ctx.needs_input_grad[1]:
            by_scale = (gradient * rounded - passed * weight).flatten(1).sum(1)
        return passed, by_scale


class FakeQuantize(nn.Module):
    """Round a tensor to a learned range.

    Args:
        start: the range to begin with.
        kind: the integers.
        seen: what calibration saw of the tensor: the range never grows past it, so that what rounding clips in place
            of a Relu or Clip it goes on clipping.
        clip_only: keep values inside the range as they are.
    """

    def __init__(
        self,
        start: ActivationRange,
        kind: IntegerType,
        seen: TensorStatistics | None = None,
        *,
        clip_only: bool = False,
    ) -> None:
        super().__init__()
        self.start, self.kind, self.clip_only = start, kind, clip_only
        scale, zero = kind.parameters(start)
        self.log_scale = nn.Parameter(torch.tensor(math.log(float(scale))))
        zero_point = torch.tensor(float(zero))
        # What holds no negative numbers keeps 0 for its zero point: rounding to it is a Relu.
        if kind.symmetric or start.low == 0.0:
            self.register_buffer("zero_point", zero_point)
        else:
            self.zero_point = nn.Parameter(zero_point)
        self.least, self.most = (-TOP - 1, TOP) if kind.symmetric else (0, 255)
        widest = max(start.high, seen.high) if seen is not None and not kind.symmetric else math.inf
        self._largest = math.log(max(widest, 1e-8) / 255) if start.low == 0.0 and math.isfinite(widest) else math.inf

    def forward(self, values: Tensor) -> Tensor:
        """Return the values rounded, in their own shape."""
        kind = self.least, self.most, self.clip_only
        rounded: Tensor = _RoundTensor.apply(values, self._log_scale(), self.zero_point, kind)  # type: ignore[no-untyped-call]
        return rounded

    def scale(self) -> Tensor:
        """Return the step that values are rounded to now, a scalar."""
        return self._log_scale().exp()

    def range(self) -> ActivationRange:
        """Return the range that is rounded to now."""
        with torch.no_grad():
            scale = float(self.scale())
            zero = float(self.zero_point.round().clamp(self.least, self.most))
        if self.kind.symmetric:
            amax = scale * TOP
            return ActivationRange(low=max(self.start.low, -amax), high=min(self.start.high, amax), amax=amax)
        low, high = -zero * scale, (255 - zero) * scale
        grown = scale / float(self.kind.parameters(self.start)[0])
        return ActivationRange(low=low if zero else 0.0, high=high, amax=self.start.amax * grown)

    def _log_scale(self) -> Tensor:
        """Return the parameter, within its bound; the gradient passes, so that it can come back."""
        if math.isinf(self._largest):
            return self.log_scale
        return self.log_scale + (self.log_scale.clamp(max=self._largest) - self.log_scale).detach()


class FakeQuantizedWeight(nn.Module):
    """A weight, ``(channels, ...)``, rounded to int8 with one scale for each channel.

    Args:
        weight: in float.
        integers: what the plan rounds it to.
        scales: ``(channels,)``, the plan's.
        reduce_range: follow the weight with the scale instead of learning it, so that no two products saturate.
    """

    def __init__(
        self, weight: Tensor, integers: npt.NDArray[np.int8], scales: npt.NDArray[np.float32], *, reduce_range: bool
    ) -> None:
        super().__init__()
        steps = torch.from_numpy(np.ascontiguousarray(scales))
        rounded = torch.from_numpy(np.ascontiguousarray(integers)).float()
        left = (weight / along(steps, weight) - rounded).clamp(-_KEPT_SIDE, _KEPT_SIDE)
        self.weight = nn.Parameter(((rounded + left) * along(steps, weight)).contiguous())
        self.reduce_range = reduce_range
        self.log_scales = nn.Parameter(steps.log(), requires_grad=not reduce_range)

    def forward(self) -> Tensor:
        """Return the weight rounded."""
        rounded: Tensor = _RoundChannels.apply(self.weight, self._log_scales())  # type: ignore[no-untyped-call]
        return rounded

    def scales(self) -> Tensor:
        """Return the steps that each channel is rounded to now, ``(channels,)``."""
        return self._log_scales().exp()

    def quantized(self) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
        """Return the integers, of the weight's shape, and the scales ``(channels,)`` that it is rounded to now."""
        weight = self.weight.detach().cpu()
        if self.reduce_range:
            return quantize_weight(weight.numpy(), 0, reduce_range=True)
        with torch.no_grad():
            scales = self.log_scales.cpu().exp()
            integers = (weight / along(scales, weight)).round().clamp(-TOP, TOP)
        return integers.to(torch.int8).numpy(), scales.numpy()

    @property
    def step(self) -> float:
        """The median scale: how far apart the values are that a weight can have."""
        return float(self.log_scales.detach().exp().median())

    def _log_scales(self) -> Tensor:
        if not self.reduce_range:
            return self.log_scales
        with torch.no_grad():
            rows = self.weight.flatten(1)
            amax = rows.abs().amax(1)
            pairs = [one.clamp_min(0).topk(min(2, rows.shape[1]), dim=1).values.sum(1) for one in (rows, -rows)]
            floor = max(float(amax.max()) * LEAST_SHARE, 1e-8)
            return (torch.maximum(torch.maximum(*pairs), amax).clamp_min(floor) / TOP).log()


class FakeQuantizeBias(nn.Module):
    """Round a bias, ``(channels,)``, to the steps of the products that it is added to; the gradient passes.

    Args:
        activation: what rounds the other operand of the products.
        weight: what rounds their weight.
        offset: what a kernel adds to the bias before it rounds, and takes away afterwards.
    """

    def __init__(self, activation: FakeQuantize, weight: FakeQuantizedWeight, offset: float = 0.0) -> None:
        super().__init__()
        self._offset = offset
        self._factors = (activation, weight)  # in a tuple, so that their parameters are in the state dict once

    def forward(self, bias: Tensor) -> Tensor:
        """Return the bias rounded."""
        with torch.no_grad():
            activation, weight = self._factors
            steps = (activation.scale() * weight.scales()).double()
            rounded = (((bias + self._offset) / steps).round_() * steps - self._offset).float()
        return bias + (rounded - bias).detach()


def along(channels: Tensor, weight: Tensor) -> Tensor:
    """Return ``(channels,)`` in a shape that goes with the weight's."""
    return channels.reshape(-1, *[1] * (weight.dim() - 1))


def _dot(one: Tensor, two: Tensor) -> Tensor:
    """Return the sum of the products of two tensors of one shape, with no copy where their layout is the same."""
    if two.dim() == 4 and two.is_contiguous(memory_format=torch.channels_last):
        one, two = one.permute(0, 2, 3, 1), two.permute(0, 2, 3, 1)
    return torch.dot(one.reshape(-1), two.reshape(-1))
