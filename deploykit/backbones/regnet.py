"""RegNet X and Y: Radosavovic et al. 2020, "Designing Network Design Spaces".

Y is X with squeeze-and-excitation between the grouped and the last convolution of each block.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from deploykit.backbones.base import BackboneOptions, BaseBackbone, PretrainedSource
from deploykit.backbones.features import DilationPlan, ReceptiveField
from deploykit.spec import FeatureLevel, Preprocessing

_STEM_WIDTH = 32


@dataclass(frozen=True, kw_only=True)
class RegNetVariant:
    """One RegNet: blocks and channels of its four stages.

    ``group_size`` is the channels of one group, bounded by the stage's width. ``se_ratio`` is the
    squeezed width over the block's input width; 0 means no squeeze-and-excitation.
    """

    depths: tuple[int, int, int, int]
    widths: tuple[int, int, int, int]
    group_size: int
    se_ratio: float = 0.0
    pretrained: PretrainedSource | None


def _x(
    group_size: int,
    depths: tuple[int, int, int, int],
    widths: tuple[int, int, int, int],
    tag: str,
    *,
    crop_pct: float = 0.875,
    se_ratio: float = 0.0,
) -> RegNetVariant:
    source = PretrainedSource(tag=tag, preprocessing=Preprocessing(crop_pct=crop_pct))
    return RegNetVariant(depths=depths, widths=widths, group_size=group_size, se_ratio=se_ratio, pretrained=source)


def _y(
    group_size: int,
    depths: tuple[int, int, int, int],
    widths: tuple[int, int, int, int],
    tag: str,
    *,
    crop_pct: float = 0.875,
) -> RegNetVariant:
    return _x(group_size, depths, widths, tag, crop_pct=crop_pct, se_ratio=0.25)


# fmt: off
VARIANTS: dict[str, RegNetVariant] = {
    "regnetx_002": _x(8, (1, 1, 4, 7), (24, 56, 152, 368), "pycls_in1k"),
    "regnetx_004": _x(16, (1, 2, 7, 12), (32, 64, 160, 384), "pycls_in1k"),
    "regnetx_006": _x(24, (1, 3, 5, 7), (48, 96, 240, 528), "pycls_in1k"),
    "regnetx_008": _x(16, (1, 3, 7, 5), (64, 128, 288, 672), "tv2_in1k", crop_pct=0.965),
    "regnetx_016": _x(24, (2, 4, 10, 2), (72, 168, 408, 912), "tv2_in1k", crop_pct=0.965),
    "regnetx_032": _x(48, (2, 6, 15, 2), (96, 192, 432, 1008), "tv2_in1k", crop_pct=0.965),
    "regnetx_040": _x(40, (2, 5, 14, 2), (80, 240, 560, 1360), "pycls_in1k"),
    "regnetx_064": _x(56, (2, 4, 10, 1), (168, 392, 784, 1624), "pycls_in1k"),
    "regnetx_080": _x(120, (2, 5, 15, 1), (80, 240, 720, 1920), "tv2_in1k", crop_pct=0.965),
    "regnetx_120": _x(112, (2, 5, 11, 1), (224, 448, 896, 2240), "pycls_in1k"),
    "regnetx_160": _x(128, (2, 6, 13, 1), (256, 512, 896, 2048), "tv2_in1k", crop_pct=0.965),
    "regnety_002": _y(8, (1, 1, 4, 7), (24, 56, 152, 368), "pycls_in1k"),
    "regnety_004": _y(8, (1, 3, 6, 6), (48, 104, 208, 440), "tv2_in1k", crop_pct=0.965),
    "regnety_006": _y(16, (1, 3, 7, 4), (48, 112, 256, 608), "pycls_in1k"),
    "regnety_008": _y(16, (1, 3, 8, 2), (64, 128, 320, 768), "pycls_in1k"),
    "regnety_016": _y(24, (2, 6, 17, 2), (48, 120, 336, 888), "tv2_in1k", crop_pct=0.965),
    "regnety_032": _y(24, (2, 5, 13, 1), (72, 216, 576, 1512), "ra_in1k", crop_pct=0.95),
    "regnety_040": _y(64, (2, 6, 12, 2), (128, 192, 512, 1088), "ra3_in1k", crop_pct=0.95),
    "regnety_064": _y(72, (2, 7, 14, 2), (144, 288, 576, 1296), "ra3_in1k", crop_pct=0.95),
    "regnety_080": _y(56, (2, 4, 10, 1), (168, 448, 896, 2016), "ra3_in1k", crop_pct=0.95),
    "regnety_120": _y(112, (2, 5, 11, 1), (224, 448, 896, 2240), "sw_in12k_ft_in1k", crop_pct=0.95),
    "regnety_160": _y(112, (2, 4, 11, 1), (224, 448, 1232, 3024), "sw_in12k_ft_in1k", crop_pct=0.95),
}
# fmt: on


class ConvNorm(nn.Module):
    """Convolution, BatchNorm, and ReLU where ``act`` is set."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        act: bool = True,
    ) -> None:
        super().__init__()
        padding = dilation * (kernel - 1) // 2
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel, stride, padding, dilation=dilation, groups=groups, bias=False
        )
        self.bn = nn.BatchNorm2d(out_channels)
        self.act = nn.ReLU(inplace=True) if act else nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to ``(N, D, H/stride, W/stride)``."""
        normed: Tensor = self.act(self.bn(self.conv(features)))
        return normed


class SqueezeExcite(nn.Module):
    """Gates each channel by what the image holds on average (Hu et al. 2018)."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.act = nn.ReLU(inplace=True)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)
        self.gate = nn.Sigmoid()

    def forward(self, features: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to the same shape."""
        pooled = features.mean((2, 3), keepdim=True)
        gated: Tensor = features * self.gate(self.fc2(self.act(self.fc1(pooled))))
        return gated


class Bottleneck(nn.Module):
    """The X or Y block, whose bottleneck is as wide as its output."""

    def __init__(
        self, in_channels: int, out_channels: int, *, stride: int, dilation: int, group_size: int, se_ratio: float
    ) -> None:
        super().__init__()
        groups = out_channels // min(group_size, out_channels)
        self.conv1 = ConvNorm(in_channels, out_channels, 1)
        self.conv2 = ConvNorm(out_channels, out_channels, 3, stride=stride, dilation=dilation, groups=groups)
        self.se = SqueezeExcite(out_channels, round(in_channels * se_ratio)) if se_ratio else nn.Identity()
        self.conv3 = ConvNorm(out_channels, out_channels, 1, act=False)
        same_shape = stride == 1 and in_channels == out_channels
        self.downsample = (
            nn.Identity() if same_shape else ConvNorm(in_channels, out_channels, 1, stride=stride, act=False)
        )
        self.act3 = nn.ReLU(inplace=True)

    def forward(self, features: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to ``(N, D, H/stride, W/stride)``."""
        residual = self.conv3(self.se(self.conv2(self.conv1(features))))
        output: Tensor = self.act3(residual + self.downsample(features))
        return output


class Head(nn.Module):
    """Global mean and the classifier."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, num_classes) if num_classes else nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to ``(N, num_classes)``, or ``(N, C)`` when there are no classes."""
        logits: Tensor = self.fc(features.mean((2, 3)))
        return logits


def _stage(
    in_channels: int, variant: RegNetVariant, index: int, *, stride: int, first_dilation: int, dilation: int
) -> nn.Sequential:
    """Blocks ``b1``, ``b2``, ... of stage ``index`` (0 to 3); the first one carries the stride."""
    width = variant.widths[index]
    stage = nn.Sequential()
    for block in range(variant.depths[index]):
        first = block == 0
        bottleneck = Bottleneck(
            in_channels if first else width,
            width,
            stride=stride if first else 1,
            dilation=first_dilation if first else dilation,
            group_size=variant.group_size,
            se_ratio=variant.se_ratio,
        )
        stage.add_module(f"b{block + 1}", bottleneck)
    return stage


class RegNet(BaseBackbone):
    """RegNet X and Y, with levels ``stem`` (stride 2) and ``stage1`` to ``stage4`` (strides 4 to 32)."""

    family: ClassVar[str] = "regnet"
    variants: ClassVar[Mapping[str, RegNetVariant]] = VARIANTS
    output_strides: ClassVar[tuple[int, ...]] = (8, 16, 32)

    def __init__(self, name: str, options: BackboneOptions) -> None:
        super().__init__(name, options)
        variant = self.variants[name]
        self.stem = ConvNorm(options.in_channels, _STEM_WIDTH, 3, stride=2)
        seen = ReceptiveField().conv(3, stride=2)
        levels = [FeatureLevel(name="stem", index=0, channels=_STEM_WIDTH, stride=2, receptive_field=seen.pixels)]
        plan = DilationPlan(output_stride=options.output_stride, stride=2)
        channels = _STEM_WIDTH
        for index, (depth, width) in enumerate(zip(variant.depths, variant.widths, strict=True)):
            first_dilation = plan.dilation
            plan, stride, dilation = plan.next(2)
            stage = _stage(channels, variant, index, stride=stride, first_dilation=first_dilation, dilation=dilation)
            self.add_module(f"s{index + 1}", stage)
            channels = width
            seen = seen.conv(3, stride, first_dilation)
            for _ in range(depth - 1):
                seen = seen.conv(3, 1, dilation)
            seen = seen.everywhere() if variant.se_ratio else seen
            levels.append(
                FeatureLevel(
                    name=f"stage{index + 1}",
                    index=index + 1,
                    channels=width,
                    stride=plan.stride,
                    receptive_field=seen.pixels,
                )
            )
        self.head = Head(channels, options.num_classes)
        self.apply(_init_weights)
        self.finish(levels, pretrained=variant.pretrained)

    def forward_levels(self, images: Tensor, depth: int) -> tuple[list[Tensor], Tensor]:
        """See `BaseBackbone.forward_levels`; the state is the last map."""
        maps: list[Tensor] = []
        features = images
        for (stage,) in list(self.stage_modules().values())[:depth]:
            features = self.run_stage(stage, features)
            maps.append(features)
        return maps, features

    def forward_head(self, trunk: Tensor) -> Tensor:
        """Map ``(N, C, H/32, W/32)`` to ``(N, num_classes)`` logits, or the ``(N, C)`` mean."""
        output: Tensor = self.head(trunk)
        return output

    def stage_modules(self) -> dict[str, tuple[nn.Module, ...]]:
        """Return the stem and the four stages, one module each."""
        stages = {f"stage{index}": (self.get_submodule(f"s{index}"),) for index in range(1, 5)}
        return {"stem": (self.stem,), **stages}


def _init_weights(module: nn.Module) -> None:
    """He et al. 2015 by fan-out for convolutions; residual branches start at zero."""
    if isinstance(module, nn.Conv2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, 0.0, 0.01)
        nn.init.zeros_(module.bias)
    elif isinstance(module, Bottleneck):
        nn.init.zeros_(module.conv3.bn.weight)
