"""ViTs on a convolutional stem: ResNetV2 with GroupNorm and standardised weights, then a transformer.

Dosovitskiy et al. 2021 ("hybrid architecture"), in the sizes of Steiner et al. 2022 ("How to train
your ViT?"). The names are those of timm's ``vit_*_r*`` models; levels are blocks, as in `vit`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deploykit.backbones.base import PretrainedSource
from deploykit.backbones.graph_constants import GraphConstants
from deploykit.backbones.inverted_residual import same_padding
from deploykit.backbones.patch_embedding import PatchEmbed
from deploykit.backbones.vit import VisionTransformer, VitVariant
from deploykit.spec import Preprocessing


@dataclass(frozen=True, kw_only=True)
class HybridVariant(VitVariant):
    """A ViT whose tokens are the values of a ResNet's last map; ``layers`` blocks in each of its stages."""

    layers: tuple[int, ...]


_HALF = Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), crop_pct=0.9)

VARIANTS: Mapping[str, HybridVariant] = {
    "vit_small_r26_s32_224": HybridVariant(
        dim=384,
        depth=12,
        heads=6,
        patch=32,
        layers=(2, 2, 2, 2),
        pretrained=PretrainedSource(tag="augreg_in21k_ft_in1k", preprocessing=_HALF),
    ),
    "vit_base_r50_s16_224": HybridVariant(
        dim=768,
        depth=12,
        heads=12,
        patch=16,
        layers=(3, 4, 9),
        pretrained=PretrainedSource(tag="orig_in21k", preprocessing=_HALF, num_classes=0, label_set=None),
    ),
}


class StandardisedConv(GraphConstants, nn.Conv2d):
    """A convolution with TensorFlow's SAME padding whose filters have mean 0 and variance 1 (Qiao et al. 2019)."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, kernel, stride=stride, bias=False)
        self.keep_constants()

    def graph_constants(self) -> dict[str, Tensor]:
        """Return the standardised filters."""
        variance, mean = torch.var_mean(self.weight, (1, 2, 3), correction=0, keepdim=True)
        return {"filters": (self.weight - mean) / (variance + 1e-8).sqrt()}

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to ``(N, D, ceil(H/stride), ceil(W/stride))``."""
        filters = self.constants()["filters"]
        top, bottom = same_padding(input.shape[2], self.kernel_size[0], self.stride[0], 1)
        left, right = same_padding(input.shape[3], self.kernel_size[1], self.stride[1], 1)
        if (top, left) == (bottom, right):
            return F.conv2d(input, filters, None, self.stride, (top, left))
        return F.conv2d(F.pad(input, (left, right, top, bottom)), filters, None, self.stride)


class MaxPoolSame(nn.Module):
    """A 3x3 max-pooling of stride 2 with SAME padding; ``(N, C, H, W)`` to half the size, rounded up."""

    def forward(self, features: Tensor) -> Tensor:
        """Return the padding is 0: the map is what a ReLU gave."""
        top, bottom = same_padding(features.shape[2], 3, 2, 1)
        left, right = same_padding(features.shape[3], 3, 2, 1)
        return F.max_pool2d(F.pad(features, (left, right, top, bottom)), 3, 2)


class Downsample(nn.Module):
    """The shortcut of a stage's first block."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv = StandardisedConv(in_channels, out_channels, 1, stride)
        self.norm = nn.GroupNorm(32, out_channels)

    def forward(self, features: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to ``(N, D, ceil(H/stride), ceil(W/stride))``."""
        output: Tensor = self.norm(self.conv(features))
        return output


class Bottleneck(nn.Module):
    """1x1, 3x3 with the stride, 1x1, each with a GroupNorm, and a residual."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int, first: bool) -> None:
        super().__init__()
        middle = out_channels // 4
        self.downsample = Downsample(in_channels, out_channels, stride) if first else None
        self.conv1 = StandardisedConv(in_channels, middle, 1)
        self.norm1 = nn.GroupNorm(32, middle)
        self.conv2 = StandardisedConv(middle, middle, 3, stride)
        self.norm2 = nn.GroupNorm(32, middle)
        self.conv3 = StandardisedConv(middle, out_channels, 1)
        self.norm3 = nn.GroupNorm(32, out_channels)

    def forward(self, features: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to ``(N, D, ceil(H/stride), ceil(W/stride))``."""
        shortcut = features if self.downsample is None else self.downsample(features)
        residual = F.relu(self.norm1(self.conv1(features)))
        residual = F.relu(self.norm2(self.conv2(residual)))
        return F.relu(self.norm3(self.conv3(residual)) + shortcut)


class Stage(nn.Module):
    """Bottlenecks of one width; the first has the stride."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            Bottleneck(in_channels, out_channels, stride=stride, first=True),
            *(Bottleneck(out_channels, out_channels, stride=1, first=False) for _ in range(depth - 1)),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to ``(N, D, ceil(H/stride), ceil(W/stride))``."""
        output: Tensor = self.blocks(features)
        return output


class ResNetStem(nn.Module):
    """ResNetV2 without pre-activation, of stride 16 (three stages) or 32 (four)."""

    def __init__(self, in_channels: int, layers: tuple[int, ...]) -> None:
        super().__init__()
        self.stem = nn.Sequential()
        self.stem.add_module("conv", StandardisedConv(in_channels, 64, 7, 2))
        self.stem.add_module("norm", nn.GroupNorm(32, 64))
        self.stem.add_module("act", nn.ReLU(inplace=True))
        self.stem.add_module("pool", MaxPoolSame())
        widths = (64, 256, 512, 1024, 2048)
        self.width = widths[len(layers)]
        self.stages = nn.Sequential(
            *(
                Stage(widths[number], widths[number + 1], stride=1 if number == 0 else 2, depth=depth)
                for number, depth in enumerate(layers)
            )
        )

    def forward(self, images: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to ``(N, width, ceil(H/stride), ceil(W/stride))``."""
        output: Tensor = self.stages(self.stem(images))
        return output


class HybridEmbed(PatchEmbed):
    """One token a value of the stem's last map: ``(N, C, H, W)`` to ``(N, ceil(H/stride) * ceil(W/stride), dim)``."""

    def __init__(self, image_size: tuple[int, int], variant: HybridVariant, in_channels: int) -> None:
        stride = variant.patch
        rows, columns = (-(-side // stride) for side in image_size)
        backbone = ResNetStem(in_channels, variant.layers)
        super().__init__((rows, columns), 1, backbone.width, variant.dim)
        self.backbone = backbone
        self.stride = stride

    def forward(self, images: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to ``(N, T, dim)``."""
        return super().forward(self.backbone(images))


class HybridViT(VisionTransformer):
    """A ViT on a ResNetV2 stem; the image size is fixed at construction, of any size."""

    family: ClassVar[str] = "hybrid"
    variants: ClassVar[Mapping[str, HybridVariant]] = VARIANTS
    why_not_output_stride: ClassVar[str] = "all its levels have the stride of its stem"
    takes_patch_size: ClassVar[bool] = False

    def _make_patch_embed(self, image_size: tuple[int, int]) -> HybridEmbed:
        variant = self.variants[self.name]
        return HybridEmbed(image_size, variant, self.options.in_channels)

    def _native_grid(self, patch_weight: Tensor) -> tuple[int, int]:
        height, width = self.variant.pretrained.image_size
        return -(-height // self.patch_embed.stride), -(-width // self.patch_embed.stride)
