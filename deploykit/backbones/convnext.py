"""ConvNeXt: Liu et al. 2022, "A ConvNet for the 2020s"; V2: Woo et al. 2023, "ConvNeXt V2".

V2 replaces the layer scale by Global Response Normalization inside the MLP. Atto to nano run their
MLP as 1x1 convolutions, the others as linear layers on channels-last maps; their weights differ in shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deploykit.backbones.base import BackboneOptions, BaseBackbone, PretrainedSource
from deploykit.backbones.features import DilationPlan, ReceptiveField
from deploykit.spec import FeatureLevel, Preprocessing

_KERNEL = 7
_PATCH = 4
_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class ConvNeXtVariant:
    """One ConvNeXt: blocks and channels of its four stages.

    ``conv_mlp``: the MLP is made of 1x1 convolutions. ``response_norm``: V2, with Global Response
    Normalization and without layer scale.
    """

    depths: tuple[int, int, int, int]
    widths: tuple[int, int, int, int]
    conv_mlp: bool = False
    response_norm: bool = False
    pretrained: PretrainedSource | None


def _variant(
    depths: tuple[int, int, int, int],
    width: int,
    tag: str,
    *,
    crop_pct: float = 0.875,
    conv_mlp: bool = False,
    response_norm: bool = False,
) -> ConvNeXtVariant:
    return ConvNeXtVariant(
        depths=depths,
        widths=(width, 2 * width, 4 * width, 8 * width),
        conv_mlp=conv_mlp,
        response_norm=response_norm,
        pretrained=PretrainedSource(tag=tag, preprocessing=Preprocessing(crop_pct=crop_pct)),
    )


# fmt: off
VARIANTS: dict[str, ConvNeXtVariant] = {
    "convnext_atto": _variant((2, 2, 6, 2), 40, "d2_in1k", conv_mlp=True),
    "convnext_femto": _variant((2, 2, 6, 2), 48, "d1_in1k", conv_mlp=True),
    "convnext_pico": _variant((2, 2, 6, 2), 64, "d1_in1k", conv_mlp=True),
    "convnext_nano": _variant((2, 2, 8, 2), 80, "in12k_ft_in1k", crop_pct=0.95, conv_mlp=True),
    "convnext_tiny": _variant((3, 3, 9, 3), 96, "in12k_ft_in1k", crop_pct=0.95),
    "convnext_small": _variant((3, 3, 27, 3), 96, "in12k_ft_in1k", crop_pct=0.95),
    "convnext_base": _variant((3, 3, 27, 3), 128, "fb_in22k_ft_in1k"),
    "convnextv2_atto": _variant((2, 2, 6, 2), 40, "fcmae_ft_in1k", conv_mlp=True, response_norm=True),
    "convnextv2_femto": _variant((2, 2, 6, 2), 48, "fcmae_ft_in1k", conv_mlp=True, response_norm=True),
    "convnextv2_pico": _variant((2, 2, 6, 2), 64, "fcmae_ft_in1k", conv_mlp=True, response_norm=True),
    "convnextv2_nano": _variant((2, 2, 8, 2), 80, "fcmae_ft_in22k_in1k", conv_mlp=True, response_norm=True),
    "convnextv2_tiny": _variant((3, 3, 9, 3), 96, "fcmae_ft_in22k_in1k", response_norm=True),
    "convnextv2_base": _variant((3, 3, 27, 3), 128, "fcmae_ft_in22k_in1k", response_norm=True),
}
# fmt: on


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of ``(N, C, H, W)``."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=_EPS)

    def forward(self, features: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to the same shape."""
        normed: Tensor = super().forward(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        # torch 2.13 limits a dynamic batch to the example's when a convolution reads a permuted map of one image.
        return normed.contiguous() if torch.onnx.is_in_onnx_export() else normed


class GlobalResponseNorm(nn.Module):
    """Scales each channel by its energy over the image, relative to the other channels' (Woo et al. 2023).

    Args:
        channels: of the maps.
        channels_last: maps are ``(N, H, W, C)``; otherwise ``(N, C, H, W)``.
    """

    def __init__(self, channels: int, *, channels_last: bool) -> None:
        super().__init__()
        self.channels_last = channels_last
        self.weight = nn.Parameter(torch.zeros(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, features: Tensor) -> Tensor:
        """Return ``features * (1 + weight * relative energy) + bias``, in the same layout."""
        space, channel, shape = ((1, 2), -1, (-1,)) if self.channels_last else ((2, 3), 1, (-1, 1, 1))
        energy: Tensor = torch.linalg.vector_norm(features, dim=space, keepdim=True)
        relative = energy / (energy.mean(dim=channel, keepdim=True) + _EPS)
        return features * (1.0 + self.weight.reshape(shape) * relative) + self.bias.reshape(shape)


class Mlp(nn.Module):
    """Linear, GELU, Global Response Normalization in V2, linear; the hidden layer is four times as wide."""

    def __init__(self, channels: int, *, conv: bool, response_norm: bool) -> None:
        super().__init__()
        hidden = 4 * channels
        self.fc1 = nn.Conv2d(channels, hidden, 1) if conv else nn.Linear(channels, hidden)
        self.act = nn.GELU()
        self.grn = GlobalResponseNorm(hidden, channels_last=not conv) if response_norm else nn.Identity()
        self.fc2 = nn.Conv2d(hidden, channels, 1) if conv else nn.Linear(hidden, channels)

    def forward(self, features: Tensor) -> Tensor:
        """Return ``(N, C, H, W)`` if ``conv``, else ``(N, H, W, C)``, to the same shape."""
        mapped: Tensor = self.fc2(self.grn(self.act(self.fc1(features))))
        return mapped


class Block(nn.Module):
    """Depthwise 7x7, LayerNorm and MLP, with a residual around; layer scale in V1."""

    def __init__(self, channels: int, *, dilation: int, conv_mlp: bool, response_norm: bool) -> None:
        super().__init__()
        padding = dilation * (_KERNEL - 1) // 2
        self.conv_dw = nn.Conv2d(channels, channels, _KERNEL, padding=padding, dilation=dilation, groups=channels)
        self.norm = ChannelNorm(channels) if conv_mlp else nn.LayerNorm(channels, eps=_EPS)
        self.mlp = Mlp(channels, conv=conv_mlp, response_norm=response_norm)
        self.conv_mlp = conv_mlp
        self.gamma = None if response_norm else nn.Parameter(torch.full((channels,), 1e-6))

    def forward(self, features: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to the same shape."""
        mixed: Tensor = self.conv_dw(features)
        if self.conv_mlp:
            mixed = self.mlp(self.norm(mixed))
            return features + (mixed if self.gamma is None else mixed * self.gamma.reshape(-1, 1, 1))
        mixed = self.mlp(self.norm(mixed.permute(0, 2, 3, 1)))
        # Beside the linear layer a fusion pass can fold it; behind the permutation it cannot.
        mixed = mixed if self.gamma is None else mixed * self.gamma
        return features + mixed.permute(0, 3, 1, 2)


class DownsampleConv(nn.Conv2d):
    """2x2 convolution of stride 2; with stride 1 it keeps the size by zeros, as TensorFlow's SAME does."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int, dilation: int) -> None:
        super().__init__(in_channels, out_channels, 2, stride=stride, dilation=dilation)
        total = dilation if stride == 1 else 0
        self.before, self.after = total // 2, total - total // 2

    def forward(self, features: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to ``(N, D, H // stride, W // stride)``."""
        if self.after:
            features = F.pad(features, (self.before, self.after, self.before, self.after))
        return super().forward(features)


class Stage(nn.Module):
    """Downsampling, where the stage has it, and the blocks."""

    def __init__(
        self, in_channels: int, variant: ConvNeXtVariant, index: int, *, stride: int, dilation: int, first_dilation: int
    ) -> None:
        super().__init__()
        channels = variant.widths[index]
        self.downsample: nn.Module = nn.Identity()
        if index > 0:
            conv = DownsampleConv(in_channels, channels, stride=stride, dilation=first_dilation)
            self.downsample = nn.Sequential(ChannelNorm(in_channels), conv)
        self.blocks = nn.Sequential(
            *(
                Block(channels, dilation=dilation, conv_mlp=variant.conv_mlp, response_norm=variant.response_norm)
                for _ in range(variant.depths[index])
            )
        )


class Head(nn.Module):
    """Global mean, LayerNorm and the classifier."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=_EPS)
        self.fc = nn.Linear(channels, num_classes) if num_classes else nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to ``(N, num_classes)``, or ``(N, C)`` when there are no classes."""
        logits: Tensor = self.fc(self.norm(features.mean((2, 3))))
        return logits


class ConvNeXt(BaseBackbone):
    """ConvNeXt V1 and V2, with levels ``stage1`` to ``stage4`` (strides 4 to 32) and none of stride 2.

    There is no stochastic depth: a training recipe that wants it wraps the blocks.
    """

    family: ClassVar[str] = "convnext"
    variants: ClassVar[Mapping[str, ConvNeXtVariant]] = VARIANTS
    output_strides: ClassVar[tuple[int, ...]] = (8, 16, 32)

    def __init__(self, name: str, options: BackboneOptions) -> None:
        super().__init__(name, options)
        variant = self.variants[name]
        width = variant.widths[0]
        self.stem = nn.Sequential(nn.Conv2d(options.in_channels, width, _PATCH, stride=_PATCH), ChannelNorm(width))
        seen = ReceptiveField().conv(_PATCH, _PATCH)
        plan = DilationPlan(output_stride=options.output_stride, stride=_PATCH)
        self.stages = nn.Sequential()
        levels: list[FeatureLevel] = []
        for index, depth in enumerate(variant.depths):
            plan, stride, dilation = plan.next(1 if index == 0 else 2)
            # timm's rule: a kernel of 2 stays dense at dilation 2 and is never dilated by more than 2.
            first_dilation = 1 if dilation <= 2 else 2
            self.stages.append(
                Stage(width, variant, index, stride=stride, dilation=dilation, first_dilation=first_dilation)
            )
            width = variant.widths[index]
            seen = seen if index == 0 else seen.conv(2, stride, first_dilation)
            for _ in range(depth):
                seen = seen.conv(_KERNEL, 1, dilation)
            seen = seen.everywhere() if variant.response_norm else seen
            levels.append(
                FeatureLevel(
                    name=f"stage{index + 1}",
                    index=index + 1,
                    channels=width,
                    stride=plan.stride,
                    receptive_field=seen.pixels,
                )
            )
        self.head = Head(width, options.num_classes)
        self.apply(_init_weights)
        self.finish(levels, pretrained=variant.pretrained)

    def forward_levels(self, images: Tensor, depth: int) -> tuple[list[Tensor], Tensor]:
        """See `BaseBackbone.forward_levels`; the state is the last map."""
        maps: list[Tensor] = []
        features: Tensor = self.stem(images)
        for stage in list(self.stages)[:depth]:
            features = self.run_stage(stage.get_submodule("downsample"), features)
            for block in stage.get_submodule("blocks").children():
                features = self.run_stage(block, features)
            maps.append(features)
        return maps, features

    def forward_head(self, trunk: Tensor) -> Tensor:
        """Map ``(N, C, H/32, W/32)`` to ``(N, num_classes)`` logits, or the normed ``(N, C)`` mean."""
        output: Tensor = self.head(trunk)
        return output

    def stage_modules(self) -> dict[str, tuple[nn.Module, ...]]:
        """Return the four stages; the stem belongs to the first."""
        first, *others = self.stages
        return {"stage1": (self.stem, first), **{f"stage{i}": (stage,) for i, stage in enumerate(others, 2)}}


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
