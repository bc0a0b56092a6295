"""Scales moved between layers so that the channels of what integer kernels read have like ranges.

``Reader(x) = Reader(diag(s) x / s)``: a channel's factor ``1/s`` goes into what writes it and ``s`` into
what reads it, so the network computes the same in real arithmetic, while a range for the whole tensor
wastes fewer of its 256 steps. Over convolutions this is cross-layer equalization (Nagel et al. 2019,
"Data-Free Quantization", section 4.1), from a norm into the layers behind it SmoothQuant (Xiao et al. 2023);
here one rule serves both, ``s = a**alpha / w**(1 - alpha)`` with the largest activation ``a`` and weight
``w`` of the channel. Scaling a channel by hand beforehand changes nothing in the result.

A ReLU6 is no such product: ``clip(x / s, 0, 6) = clip(x, 0, 6 s) / s``. With ``s <= 1`` it is one for a channel that
never leaves ``6 s``, which is known behind the first convolution: pixels have limits, and weights and bias give those
of what they make of them. Quiet channels grow up to the bound there, and those that can meet it stay. What calibration
saw is no limit: channels of deeper layers that stay below 1 in 64 images reach 6 in the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, fx
from torch.fx import GraphModule, Node

from deploykit.arrays import FloatArray
from deploykit.calibration.channel_groups import NORM_GAINS, ChannelGroup, channel_groups
from deploykit.calibration.images import CalibrationSet
from deploykit.fusion.affine import LINEAR
from deploykit.fusion.constants import add_call, add_constant, argument, constant, set_constant, shape_of
from deploykit.fusion.pipeline import EXACT_DB, FusionPass
from deploykit.spec import InputSpec, Int8, Precision

Limits: TypeAlias = tuple[Tensor, Tensor]
LEAST_SHARE = 0.01
"""A channel quieter than this share of the median counts as this loud: a dead one must not be blown up."""
MEASURED_IMAGES = 16
"""How many images are measured: those that an export compares its numbers on."""


def equalization_passes(
    precision: Precision, calibration: CalibrationSet | None, spec: InputSpec
) -> tuple[FusionPass, ...]:
    """Return the pass that INT8 adds to a pipeline, with the images that it measures on; none for other precisions."""
    if not isinstance(precision, Int8) or calibration is None:
        return ()
    images, alpha = calibration.sample(MEASURED_IMAGES), precision.filled().equalization
    if not isinstance(alpha, float | int):
        return ()
    size = spec.batch if isinstance(spec.batch, int) else 4
    batches = [images[np.arange(start, start + size) % len(images)] for start in range(0, len(images), size)]
    limits = image_limits(images, spec)

    def rewrite(module: GraphModule) -> int:
        return equalize(module, batches, alpha=alpha, limits=limits)

    return (FusionPass(name="equalize-channels", rewrite=rewrite, min_sqnr_db=EXACT_DB),)


def image_limits(images: FloatArray, spec: InputSpec) -> Limits:
    """Return the least and the largest value of each channel, ``(C,)``: of pixels as they are prepared, and of images.

    Args:
        images: ``(N, C, H, W)``, which may be prepared in another way.
        spec: of the input.
    """
    low, high = torch.from_numpy(images.min((0, 2, 3))), torch.from_numpy(images.max((0, 2, 3)))
    mean, std = torch.tensor(spec.preprocessing.mean), torch.tensor(spec.preprocessing.std)
    if len(mean) != len(low):
        return low, high
    return torch.minimum(low, -mean / std), torch.maximum(high, (1 - mean) / std)


def equalize(module: GraphModule, batches: Iterable[FloatArray], *, alpha: float, limits: Limits) -> int:
    """Scale every group of channels that the weights alone connect, in place; exact in real arithmetic.

    Args:
        module: the flat graph of a fused program in FP32.
        batches: ``(N, C, H, W)`` images to measure activations on; without any, nothing is scaled.
        alpha: 0 to 1, how much of the spread goes from the activations into the weights.
        limits: the least and the largest value of each channel of an image, ``(C,)``.

    Returns:
        How many groups were scaled.
    """
    groups = channel_groups(module)
    loudness = _measure(module, groups, batches)
    loud = [(group, amax) for group, amax in zip(groups, loudness, strict=True) if float(amax.max()) > 0]
    for group, amax in loud:
        scale_group(module, group, _factors(module, group, amax, alpha, limits))
    module.recompile()
    return len(loud)


def _measure(module: GraphModule, groups: list[ChannelGroup], batches: Iterable[FloatArray]) -> list[Tensor]:
    """Return the largest magnitude of each channel of each group, ``(C,)``, in what its readers read."""
    wanted = {source: (index, axis) for index, group in enumerate(groups) for source, axis in group.sources.items()}
    found = [torch.zeros(group.channels) for group in groups]

    class Listener(fx.Interpreter):
        def run_node(self, node: Node) -> object:
            value = super().run_node(node)
            if node in wanted:
                index, axis = wanted[node]
                amax = value.abs().amax([other for other in range(value.dim()) if other != axis])
                found[index] = torch.maximum(found[index], amax)
            return value

    listener = Listener(module)
    with torch.no_grad():
        for batch in batches:
            listener.run(torch.from_numpy(batch))
    return found


def _factors(module: GraphModule, group: ChannelGroup, amax: Tensor, alpha: float, limits: Limits) -> Tensor:
    """Return ``s`` a channel, ``(C,)`` in double: with a geometric mean of 1, or where a clip stands of at most 1."""
    activation = _floored(amax.double())
    weights = [weight for reader in group.readers if (weight := _input_amax(module, reader)) is not None]
    if weights:
        weight = _floored(torch.stack(weights).amax(0))
        factors = activation**alpha / weight ** (1 - alpha)
    else:
        factors = activation  # each depthwise weight has a scale of its own, whatever it is multiplied by
    if not group.clips:
        return factors / factors.log().mean().exp()
    for conv, bound in group.clips.items():
        factors = _within_clips(factors, _most(module, conv, limits), bound)
    return factors


def _within_clips(factors: Tensor, most: Tensor, bound: float) -> Tensor:
    """Return factors of at most 1 with which no channel meets the bound of a clip that it never met before.

    Args:
        factors: those that would be best, up to a factor for all.
        most: the largest value that each channel can have in front of the clip.
        bound: of the clip.
    """
    least = (most / bound).clamp(LEAST_SHARE, 1.0)
    kept = factors[least == 1.0]
    reference = kept.median() if len(kept) else factors.max()
    return torch.maximum(least, factors / reference).clamp(max=1.0)


def _most(module: GraphModule, conv: Node, limits: Limits) -> Tensor:
    """Return the largest value that each channel of a convolution of images can have, ``(C,)`` in double."""
    weight, bias = (constant(module, argument(conv, place, name, None)) for place, name in ((1, "weight"), (2, "bias")))
    assert weight is not None  # noqa: S101  (a layer has a constant weight; narrows the type)
    if weight.shape[1] != len(limits[0]):  # with groups, which no first layer of an image has
        return torch.full((len(weight),), math.inf, dtype=torch.double)
    low, high = (limit.double().reshape(1, -1, 1, 1) for limit in limits)
    most = torch.maximum(weight.double() * low, weight.double() * high).clamp_min(0).sum((1, 2, 3))
    return most if bias is None else (most + bias.double()).clamp_min(0)


def _floored(amax: Tensor) -> Tensor:
    alive = amax[amax > 0]
    return amax.clamp_min(LEAST_SHARE * float(alive.median())) if len(alive) else torch.ones_like(amax)


def _input_amax(module: GraphModule, reader: Node) -> Tensor | None:
    """Return the largest weight that each input channel meets, ``(C,)``; None for a depthwise convolution."""
    weight = constant(module, reader.args[1])
    assert weight is not None  # noqa: S101  (a reader has a constant weight; narrows the type)
    groups = _groups(reader)
    if weight.shape[1] == 1 and groups > 1:
        return None
    return _by_input(weight.double().abs(), groups).amax((1, 3)).flatten()


def _groups(reader: Node) -> int:
    return 1 if reader.target == LINEAR else int(argument(reader, 6, "groups", 1))


def _by_input(weight: Tensor, groups: int) -> Tensor:
    """Return a weight ``(out, in / groups, ...)`` as ``(groups, out / groups, in / groups, kernel)``."""
    return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)


def _multiply_inputs(weight: Tensor, *, groups: int, factors: Tensor) -> Tensor:
    return (_by_input(weight, groups) * factors.reshape(groups, 1, -1, 1)).reshape(weight.shape)


def scale_group(module: GraphModule, group: ChannelGroup, factors: Tensor) -> None:
    """Divide what a group writes by factors ``(C,)`` in double and multiply what reads it, in place."""
    done: set[tuple[str, str]] = set()

    def change(node: object, role: str, scaled: Callable[[Tensor], Tensor]) -> None:
        value = constant(module, node)
        if (
            value is None or not isinstance(node, Node) or (str(node.target), role) in done
        ):  # two layers may share a weight
            return
        done.add((str(node.target), role))
        set_constant(module, node, scaled(value.double()).to(value.dtype))

    def divide(node: object, axis: int) -> None:
        change(node, "written", lambda value: value * _along(1 / factors, axis, value.dim()))

    for writer in group.writers:
        position = NORM_GAINS.get(writer.target, 1)
        if writer.target in NORM_GAINS and argument(writer, position, "weight", None) is None:
            _own_gain(module, writer, position, len(factors))
        divide(argument(writer, position, "weight", None), 0)
        divide(argument(writer, position + 1, "bias", None), 0)
    for shift, axis in group.shifts:
        divide(shift, axis)
    for reader in group.readers:
        change(reader.args[1], "read", partial(_multiply_inputs, groups=_groups(reader), factors=factors))
    for output, axis in group.outputs:
        _restore(module, output, axis, factors)


def _along(factors: Tensor, axis: int, axes: int) -> Tensor:
    """Return factors ``(C,)`` in a shape of so many axes."""
    return factors.reshape([-1 if each == axis else 1 for each in range(axes)])


def _own_gain(module: GraphModule, norm: Node, position: int, channels: int) -> None:
    """Give a norm without a gain one of ones."""
    gain = add_constant(module, f"equalized.{norm.name}", torch.ones(channels))
    norm.kwargs = {name: value for name, value in norm.kwargs.items() if name != "weight"}
    if len(norm.args) > position:
        norm.update_arg(position, gain)
    else:
        norm.kwargs = {**norm.kwargs, "weight": gain}


def _restore(module: GraphModule, value: Node, axis: int, factors: Tensor) -> None:
    """Let the graph's outputs give a scaled value as it was."""
    scales = add_constant(module, f"equalized.{value.name}", _along(factors.float(), axis, len(shape_of(value))))
    output = module.graph.output_node()
    restored = add_call(output, torch.ops.aten.mul.Tensor, value, scales)
    output.replace_input_with(value, restored)
