"""Levels of stride 4, 8, 16 and 32 from a plain ViT, whose maps all have the stride of its patch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from deploykit.errors import SpecError

PYRAMID_STRIDES = (4, 8, 16, 32)
SIMPLE_FEATURE_PYRAMID = "simple_feature_pyramid"


class Pyramid(Protocol):
    """Four maps from the maps of four blocks."""

    channels: int

    def __call__(self, position: int, maps: Sequence[Tensor]) -> Tensor:
        """Return the level at ``position`` (0 to 3), from the blocks' maps, shallow to deep, that are there so far."""


class ResamplePyramid(nn.Module):
    """A parameter-free pyramid: the maps of four evenly spaced blocks, resampled.

    With a patch of 16: bilinear x4, bilinear x2, as it is, average-pooled by 2 (the last window is
    cut at the border where the grid is odd). Level i comes from the i-th block, so that deeper
    levels are more abstract, as in a convolutional pyramid.

    Raises:
        SpecError: the patch is not a power of two from 4 to 32.
    """

    def __init__(self, channels: int, patch: int) -> None:
        super().__init__()
        if patch not in PYRAMID_STRIDES:
            raise SpecError(
                f"hierarchical=True needs a patch of {PYRAMID_STRIDES} pixels and this one has {patch}. "
                "Give patch_size=16: trained patch weights are resampled."
            )
        self.channels = channels
        self.patch = patch

    def forward(self, position: int, maps: Sequence[Tensor]) -> Tensor:
        """Map ``(N, D, H/patch, W/patch)`` to ``(N, D, ceil(H/stride), ceil(W/stride))``."""
        features, stride = maps[position], PYRAMID_STRIDES[position]
        if stride < self.patch:
            return F.interpolate(features, scale_factor=float(self.patch // stride), mode="bilinear")
        if stride == self.patch:
            return features
        window = stride // self.patch
        cut = any(side % window for side in features.shape[2:])
        return F.avg_pool2d(features, window, ceil_mode=cut)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of ``(N, C, H, W)``."""

    def forward(self, features: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to the same."""
        return super().forward(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SimpleFeaturePyramid(nn.Module):
    """ViTDet's pyramid (Li et al. 2022, "Exploring Plain Vision Transformer Backbones"): all levels from the last map.

    Strides 4 and 8 by one or two transposed convolutions, 16 as it is, 32 by max-pooling; then a 1x1
    and a 3x3 convolution to 256 channels, each with a LayerNorm. Its parameters, under ``pyramid.``,
    are no part of timm's checkpoints: they start random and are to be trained.

    Raises:
        SpecError: the patch is not 16 pixels.
    """

    def __init__(self, dim: int, patch: int, channels: int = 256) -> None:
        super().__init__()
        if patch != 16:
            raise SpecError(
                f"hierarchical={SIMPLE_FEATURE_PYRAMID!r} needs a patch of 16 pixels and this one has {patch}. "
                "Give patch_size=16: trained patch weights are resampled."
            )
        self.channels = channels
        half, quarter = dim // 2, dim // 4
        up4 = (
            nn.ConvTranspose2d(dim, half, 2, stride=2),
            ChannelNorm(half, eps=1e-6),
            nn.GELU(),
            nn.ConvTranspose2d(half, quarter, 2, stride=2),
        )
        up2 = (nn.ConvTranspose2d(dim, half, 2, stride=2),)
        self.levels = nn.ModuleList(
            nn.Sequential(*resize, *self._to_channels(width))
            for resize, width in ((up4, quarter), (up2, half), ((), dim), ((nn.MaxPool2d(2, ceil_mode=True),), dim))
        )

    def _to_channels(self, width: int) -> tuple[nn.Module, ...]:
        channels = self.channels
        return (
            nn.Conv2d(width, channels, 1, bias=False),
            ChannelNorm(channels, eps=1e-6),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            ChannelNorm(channels, eps=1e-6),
        )

    def forward(self, position: int, maps: Sequence[Tensor]) -> Tensor:
        """Map ``(N, D, H/16, W/16)`` to ``(N, 256, ceil(H/stride), ceil(W/stride))``."""
        output: Tensor = self.levels[position](maps[-1])
        return output
