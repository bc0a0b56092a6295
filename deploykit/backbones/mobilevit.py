"""MobileViT and MobileViTv2 (Mehta and Rastegari 2022, "MobileViT", "Separable Self-attention for Mobile ViTs").

Inverted residuals, then in the last three stages a transformer over 2x2 patches: a token attends to
the tokens at the same place of the other patches. The names are those of timm's ByobNet.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deploykit.backbones.attention import TransformerBlock
from deploykit.backbones.base import BackboneOptions, BaseBackbone, PretrainedSource
from deploykit.backbones.features import ReceptiveField
from deploykit.spec import FeatureLevel, Preprocessing

_PATCH = 2


@dataclass(frozen=True, kw_only=True)
class MobileVitVariant:
    """Widths of the stem and of five stages; width and depth of the transformers in the last three.

    ``separable`` is MobileViTv2's attention of linear cost. ``head_width`` is the width of a last
    1x1 convolution; None: there is none.
    """

    stem: int
    widths: tuple[int, int, int, int, int]
    blocks: tuple[int, int, int, int, int]
    dims: tuple[int, int, int]
    depths: tuple[int, int, int]
    expansion: int
    separable: bool
    head_width: int | None
    pretrained: PretrainedSource


def _source(crop_pct: float) -> PretrainedSource:
    plain = Preprocessing(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), crop_pct=crop_pct)
    return PretrainedSource(tag="cvnets_in1k", preprocessing=plain, image_size=(256, 256))


VARIANTS: Mapping[str, MobileVitVariant] = {
    "mobilevit_s": MobileVitVariant(
        stem=16,
        widths=(32, 64, 96, 128, 160),
        blocks=(1, 3, 1, 1, 1),
        dims=(144, 192, 240),
        depths=(2, 4, 3),
        expansion=4,
        separable=False,
        head_width=640,
        pretrained=_source(0.9),
    ),
    "mobilevitv2_100": MobileVitVariant(
        stem=32,
        widths=(64, 128, 256, 384, 512),
        blocks=(1, 2, 1, 1, 1),
        dims=(128, 192, 256),
        depths=(2, 4, 3),
        expansion=2,
        separable=True,
        head_width=None,
        pretrained=_source(0.888),
    ),
}


class ConvNormAct(nn.Sequential):
    """A convolution that keeps ``ceil(size / stride)``, BatchNorm, and SiLU unless told not to."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, *, stride: int = 1, groups: int = 1, act: bool = True
    ) -> None:
        super().__init__()
        padding = kernel // 2
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel, stride=stride, padding=padding, groups=groups, bias=False
        )
        self.bn = nn.BatchNorm2d(out_channels)
        if act:
            self.act = nn.SiLU(inplace=True)


class InvertedResidual(nn.Module):
    """1x1 to ``expansion`` times the width, depthwise 3x3, 1x1; a residual where the shape stays."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int, expansion: int) -> None:
        super().__init__()
        middle = in_channels * expansion
        self.residual = stride == 1 and in_channels == out_channels
        self.conv1_1x1 = ConvNormAct(in_channels, middle, 1)
        self.conv2_kxk = ConvNormAct(middle, middle, 3, stride=stride, groups=middle)
        self.conv3_1x1 = ConvNormAct(middle, out_channels, 1, act=False)

    def forward(self, features: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to ``(N, D, ceil(H/stride), ceil(W/stride))``."""
        output: Tensor = self.conv3_1x1(self.conv2_kxk(self.conv1_1x1(features)))
        return features + output if self.residual else output


class MobileVitBlock(nn.Module):
    """Local 3x3, a transformer over the patches, and a fusion with the input; ``(N, C, H, W)`` to the same."""

    def __init__(self, channels: int, dim: int, depth: int) -> None:
        super().__init__()
        self.conv_kxk = ConvNormAct(channels, channels, 3)
        self.conv_1x1 = nn.Conv2d(channels, dim, 1, bias=False)
        self.transformer = nn.Sequential(
            *(TransformerBlock(dim, 4, mlp_ratio=2.0, act=nn.SiLU, norm_eps=1e-5) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(dim)
        self.conv_proj = ConvNormAct(dim, channels, 1)
        self.conv_fusion = ConvNormAct(2 * channels, channels, 3)

    def forward(self, features: Tensor) -> Tensor:
        """Maps of an odd size are stretched by a pixel for the transformer and shrunk after it."""
        local = self.conv_1x1(self.conv_kxk(features))
        size, even = _sizes(local)
        if even != size:
            local = F.interpolate(local, size=even, mode="bilinear", align_corners=False)
        dim, rows, columns = local.shape[1], even[0] // _PATCH, even[1] // _PATCH
        patches = local.reshape(-1, dim, rows, _PATCH, columns, _PATCH).permute(0, 3, 5, 2, 4, 1)
        tokens = self.norm(self.transformer(patches.reshape(-1, rows * columns, dim)))
        places = tokens.reshape(-1, _PATCH, _PATCH, rows, columns, dim).permute(0, 5, 3, 1, 4, 2)
        seen = places.reshape(-1, dim, *even)
        if even != size:
            seen = F.interpolate(seen, size=size, mode="bilinear", align_corners=False)
        output: Tensor = self.conv_fusion(torch.cat([features, self.conv_proj(seen)], dim=1))
        return output


class SeparableAttention(nn.Module):
    """MobileViTv2's attention: one score a token, softmax over the tokens, so that the cost is linear."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.qkv_proj = nn.Conv2d(dim, 1 + 2 * dim, 1)
        self.out_proj = nn.Conv2d(dim, dim, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return ``(N, dim, P, T)``, P places in each of T patches, to the same."""
        query, key, value = self.qkv_proj(tokens).split([1, self.dim, self.dim], dim=1)
        context = (key * query.softmax(dim=-1)).sum(dim=-1, keepdim=True)
        output: Tensor = self.out_proj(F.relu(value) * context)
        return output


class ConvMlp(nn.Module):
    """An MLP of 1x1 convolutions."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden, 1)
        self.act = nn.SiLU()
        self.fc2 = nn.Conv2d(hidden, dim, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map ``(N, dim, P, T)`` to the same."""
        output: Tensor = self.fc2(self.act(self.fc1(tokens)))
        return output


class SeparableBlock(nn.Module):
    """A pre-norm transformer block with `SeparableAttention`; its norms are over the whole sample."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(1, dim)
        self.attn = SeparableAttention(dim)
        self.norm2 = nn.GroupNorm(1, dim)
        self.mlp = ConvMlp(dim, 2 * dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map ``(N, dim, P, T)`` to the same."""
        tokens = tokens + self.attn(self.norm1(tokens))
        output: Tensor = tokens + self.mlp(self.norm2(tokens))
        return output


class MobileVitV2Block(nn.Module):
    """Local depthwise 3x3 and a separable transformer over the patches."""

    def __init__(self, channels: int, dim: int, depth: int) -> None:
        super().__init__()
        self.conv_kxk = ConvNormAct(channels, channels, 3, groups=channels)
        self.conv_1x1 = nn.Conv2d(channels, dim, 1, bias=False)
        self.transformer = nn.Sequential(*(SeparableBlock(dim) for _ in range(depth)))
        self.norm = nn.GroupNorm(1, dim)
        self.conv_proj = ConvNormAct(dim, channels, 1, act=False)

    def forward(self, features: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to the same; an odd side grows by one pixel, as in timm."""
        size, even = _sizes(features)
        if even != size:
            features = F.interpolate(features, size=even, mode="bilinear", align_corners=True)
        local = self.conv_1x1(self.conv_kxk(features))
        dim, rows, columns = local.shape[1], even[0] // _PATCH, even[1] // _PATCH
        patches = local.reshape(-1, dim, rows, _PATCH, columns, _PATCH).permute(0, 1, 3, 5, 2, 4)
        tokens = self.norm(self.transformer(patches.reshape(-1, dim, _PATCH * _PATCH, rows * columns)))
        places = tokens.reshape(-1, dim, _PATCH, _PATCH, rows, columns).permute(0, 1, 4, 2, 5, 3)
        output: Tensor = self.conv_proj(places.reshape(-1, dim, *even))
        return output


class Head(nn.Module):
    """The mean over the map, then a linear classifier; without classes, the mean."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, num_classes) if num_classes else nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to ``(N, num_classes)`` or ``(N, C)``."""
        output: Tensor = self.fc(features.mean(dim=(2, 3)))
        return output


class MobileViT(BaseBackbone):
    """MobileViT and MobileViTv2; any image size, each side ideally a multiple of 64.

    Level ``stage4`` is the map after the last 1x1 convolution, where the variant has one.
    """

    family: ClassVar[str] = "mobilevit"
    variants: ClassVar[Mapping[str, MobileVitVariant]] = VARIANTS
    size_factor: ClassVar[int] = _PATCH
    why_not_output_stride: ClassVar[str] = "its transformers unfold maps of stride 8, 16 and 32"

    def __init__(self, name: str, options: BackboneOptions) -> None:
        super().__init__(name, options)
        variant = self.variants[name]
        self.stem = ConvNormAct(options.in_channels, variant.stem, 3, stride=2)
        inputs = (variant.stem, *variant.widths)
        self.stages = nn.Sequential(
            *(self._make_stage(variant, number, inputs[number], inputs[number + 1]) for number in range(5))
        )
        last = variant.widths[-1]
        self.final_conv = ConvNormAct(last, variant.head_width, 1) if variant.head_width else nn.Identity()
        self.head = Head(variant.head_width or last, options.num_classes)
        self._initialise()
        self.finish(self._levels(variant), pretrained=variant.pretrained)

    @staticmethod
    def _make_stage(variant: MobileVitVariant, number: int, in_channels: int, out_channels: int) -> nn.Sequential:
        expansion, strides = variant.expansion, [1 if number == 0 else 2] + [1] * (variant.blocks[number] - 1)
        stage = nn.Sequential()
        for stride in strides:
            stage.append(InvertedResidual(in_channels, out_channels, stride=stride, expansion=expansion))
            in_channels = out_channels
        if number >= 2:
            dim, depth = variant.dims[number - 2], variant.depths[number - 2]
            block = MobileVitV2Block if variant.separable else MobileVitBlock
            stage.append(block(out_channels, dim, depth))
        return stage

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
            if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    @staticmethod
    def _levels(variant: MobileVitVariant) -> list[FeatureLevel]:
        levels, field = [], ReceptiveField().conv(3, 2)
        for number, width in enumerate(variant.widths):
            field = field.conv(3, 1 if number == 0 else 2)
            for _ in range(variant.blocks[number] - 1):
                field = field.conv(3)
            field = field.everywhere() if number >= 2 else field
            levels.append(
                FeatureLevel(
                    name=f"stage{number}" if number else "stem",
                    index=number,
                    channels=variant.head_width or width if number == 4 else width,
                    stride=field.step,
                    receptive_field=field.pixels,
                )
            )
        return levels

    def forward_levels(self, images: Tensor, depth: int) -> tuple[list[Tensor], Tensor]:
        """See `BaseBackbone.forward_levels`; the state is the last map."""
        maps: list[Tensor] = []
        features = self.stem(images)
        for stage in list(self.stages)[:depth]:
            for block in stage.children():
                features = self.run_stage(block, features)
            maps.append(features)
        if depth == len(self.all_levels):
            features = maps[-1] = self.final_conv(features)
        return maps, features

    def forward_head(self, trunk: Tensor) -> Tensor:
        """See `BaseBackbone.forward_head`."""
        output: Tensor = self.head(trunk)
        return output

    def stage_modules(self) -> dict[str, tuple[nn.Module, ...]]:
        """See `BaseBackbone.stage_modules`."""
        first, *between, last = list(self.stages)
        names = [level.name for level in self.all_levels]
        modules = [(self.stem, first), *((stage,) for stage in between), (last, self.final_conv)]
        return dict(zip(names, modules, strict=True))


def _sizes(features: Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the map's size, and that size rounded up to whole patches."""
    height, width = features.shape[2], features.shape[3]
    return (height, width), (-(-height // _PATCH) * _PATCH, -(-width // _PATCH) * _PATCH)
