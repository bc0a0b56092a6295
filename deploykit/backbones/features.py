"""Receptive fields and names of feature levels, and how dilation replaces stride."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from deploykit.spec import FeatureLevel

WHOLE_IMAGE = 0
"""The receptive field of a level in which each value sees the whole image."""


@dataclass(frozen=True, kw_only=True)
class ReceptiveField:
    """The side of the input square that one value sees, in pixels, and the step between values.

    Follows Araujo, Norris and Sim, "Computing Receptive Fields of Convolutional Neural Networks",
    Distill 2019: a layer with kernel k, stride s and dilation d grows the field by
    ``(k - 1) * d * step`` and multiplies the step by s.
    """

    size: int = 1
    step: int = 1
    whole_image: bool = False

    def conv(self, kernel: int, stride: int = 1, dilation: int = 1) -> ReceptiveField:
        """After a convolution or a pooling."""
        return replace(self, size=self.size + (kernel - 1) * dilation * self.step, step=self.step * stride)

    def everywhere(self) -> ReceptiveField:
        """After a layer that looks at the whole image: attention, squeeze-and-excitation."""
        return replace(self, whole_image=True)

    @property
    def pixels(self) -> int:
        """The size in pixels, or `WHOLE_IMAGE`."""
        return WHOLE_IMAGE if self.whole_image else self.size


@dataclass(frozen=True, kw_only=True)
class DilationPlan:
    """Turns strides into dilation once ``output_stride`` is reached (Chen et al. 2017, DeepLabv3)."""

    output_stride: int = 32
    stride: int = 1
    dilation: int = 1

    def next(self, stride: int) -> tuple[DilationPlan, int, int]:
        """Return the plan after a stage of this stride, and the stride and dilation that the stage is built with."""
        if self.stride * stride > self.output_stride:
            after = replace(self, dilation=self.dilation * stride)
            return after, 1, after.dilation
        return replace(self, stride=self.stride * stride), stride, self.dilation


def levels_by_stride(strides: Sequence[int], channels: Sequence[int]) -> list[FeatureLevel]:
    """Name and index levels by deploykit's convention, from strides in the order in which the maps are made."""
    if len(strides) > 1 and len(set(strides)) == 1:
        indices = list(range(len(strides)))
        names = [f"block{index}" for index in indices]
    else:
        indices = []
        for stride in strides:
            by_stride = max(0, round(math.log2(stride)) - 1)
            # A dilated stage keeps the stride of the one before it, and its own place.
            indices.append(max(by_stride, indices[-1] + 1) if indices else by_stride)
        names = ["stem" if index == 0 else f"stage{index}" for index in indices]
    return [
        FeatureLevel(name=name, index=index, channels=width, stride=stride, receptive_field=WHOLE_IMAGE)
        for name, index, width, stride in zip(names, indices, channels, strides, strict=True)
    ]
