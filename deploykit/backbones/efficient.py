"""EfficientNet, EfficientNet-Lite and EfficientNetV2, with timm's parameter names.

Tan and Le 2019, "EfficientNet: Rethinking Model Scaling"; the Lite models drop squeeze-and-excitation
and use ReLU6 for the edge; Tan and Le 2021, "EfficientNetV2". The ``tf_`` variants have TensorFlow's
SAME padding and BatchNorm epsilon, as the weights converted from there need.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from deploykit.backbones.base import BackboneOptions, BaseBackbone, PretrainedSource
from deploykit.backbones.features import DilationPlan, ReceptiveField
from deploykit.backbones.inverted_residual import (
    BatchNormAct2d,
    ConvBnAct,
    ConvStyle,
    DepthwiseSeparable,
    EdgeResidual,
    InvertedResidual,
    Padding,
    conv2d,
    init_weights,
    make_divisible,
    relu6,
    silu,
)
from deploykit.spec import FeatureLevel, Interpolation, Preprocessing

HALF = (0.5, 0.5, 0.5)
IMAGENET = (0.485, 0.456, 0.406)
TF_BN_EPS = 1e-3


@dataclass(frozen=True, kw_only=True)
class BlockStack:
    """Blocks of one kind in a row; ``channels`` before scaling, ``se_ratio`` of the block's input channels."""

    kind: Literal["conv", "separable", "inverted", "edge"]
    repeats: int
    kernel: int = 3
    stride: int = 1
    expansion: int = 1
    channels: int
    se_ratio: float = 0.0


def _b0_stacks(se_ratio: float) -> tuple[BlockStack, ...]:
    table = ((2, 3, 2, 24), (2, 5, 2, 40), (3, 3, 2, 80), (3, 5, 1, 112), (4, 5, 2, 192), (1, 3, 1, 320))
    first = BlockStack(kind="separable", repeats=1, channels=16, se_ratio=se_ratio)
    return (
        first,
        *(
            BlockStack(
                kind="inverted",
                repeats=repeats,
                kernel=kernel,
                stride=stride,
                expansion=6,
                channels=channels,
                se_ratio=se_ratio,
            )
            for repeats, kernel, stride, channels in table
        ),
    )


def _v2_stacks(*rows: tuple[int, int, int, int]) -> tuple[BlockStack, ...]:
    """Rows of (repeats, stride, expansion, channels): one plain, two fused, the rest with squeeze-and-excitation."""
    return tuple(
        BlockStack(
            kind="conv" if index == 0 else "edge" if index < 3 else "inverted",
            repeats=repeats,
            stride=stride,
            expansion=expansion,
            channels=channels,
            se_ratio=0.25 if index >= 3 else 0.0,
        )
        for index, (repeats, stride, expansion, channels) in enumerate(rows)
    )


B0 = _b0_stacks(0.25)
LITE0 = _b0_stacks(0.0)
V2_S = _v2_stacks((2, 1, 1, 24), (4, 2, 4, 48), (4, 2, 4, 64), (6, 2, 4, 128), (9, 1, 6, 160), (15, 2, 6, 256))
V2_M = _v2_stacks(
    (3, 1, 1, 24), (5, 2, 4, 48), (5, 2, 4, 80), (7, 2, 4, 160), (14, 1, 6, 176), (18, 2, 6, 304), (5, 1, 6, 512)
)


@dataclass(frozen=True, kw_only=True)
class EfficientNetVariant:
    """An architecture: a base model's stacks, scaled by ``width`` and ``depth``.

    The Lite models leave the stem, the head and the depth of the first and last stack unscaled.
    """

    stacks: tuple[BlockStack, ...] = B0
    width: float = 1.0
    depth: float = 1.0
    stem_channels: int = 32
    lite: bool = False
    padding: Padding = "symmetric"
    bn_eps: float = 1e-5
    pretrained: PretrainedSource | None = None

    @property
    def style(self) -> ConvStyle:
        """What the blocks share."""
        return ConvStyle(activation=relu6 if self.lite else silu, padding=self.padding, bn_eps=self.bn_eps)

    def scaled(self, channels: int) -> int:
        """Channels at this width."""
        return make_divisible(channels * self.width)

    def repeats(self, index: int) -> int:
        """Blocks in a stack at this depth."""
        fixed = self.lite and index in (0, len(self.stacks) - 1)
        return self.stacks[index].repeats if fixed else math.ceil(self.stacks[index].repeats * self.depth)


def _source(
    tag: str,
    size: int,
    crop_pct: float = 0.875,
    *,
    mean: tuple[float, ...] = IMAGENET,
    interpolation: Interpolation = "bicubic",
    crop_mode: Literal["center", "squash"] = "center",
) -> PretrainedSource:
    std = HALF if mean == HALF else (0.229, 0.224, 0.225)
    preprocessing = Preprocessing(
        mean=mean, std=std, interpolation=interpolation, crop_pct=crop_pct, crop_mode=crop_mode
    )
    return PretrainedSource(
        tag=tag, preprocessing=preprocessing, image_size=(size, size), label_set="imagenet-1k" if tag else None
    )


def _tf(variant: EfficientNetVariant, source: PretrainedSource) -> EfficientNetVariant:
    return replace(variant, padding="same", bn_eps=TF_BN_EPS, pretrained=source)


_SCALES = ((1.0, 1.0), (1.0, 1.1), (1.1, 1.2), (1.2, 1.4), (1.4, 1.8))
_TF_SIZES = ((224, 0.875), (240, 0.882), (260, 0.89), (300, 0.904), (380, 0.922))
_SOURCES = (
    _source("ra_in1k", 224),
    _source("ra4_e3600_r240_in1k", 240, 0.9, mean=HALF),
    _source("ra_in1k", 256),
    _source("ra2_in1k", 288),
    _source("ra2_in1k", 320),
)
_TF_LITE_SOURCES = (
    _source("in1k", 224, 0.875, mean=HALF),
    _source("in1k", 240, 0.882, mean=HALF),
    _source("in1k", 260, 0.89, mean=HALF),
    _source("in1k", 300, 0.904, mean=HALF, interpolation="bilinear"),
    _source("in1k", 380, 0.92, mean=HALF, interpolation="bilinear"),
)
_B = tuple(
    EfficientNetVariant(width=width, depth=depth, pretrained=source)
    for (width, depth), source in zip(_SCALES, _SOURCES, strict=True)
)
_LITE = tuple(
    EfficientNetVariant(
        stacks=LITE0, width=width, depth=depth, lite=True, pretrained=_source("" if index else "ra_in1k", size, crop)
    )
    for index, ((width, depth), (size, crop)) in enumerate(zip(_SCALES, _TF_SIZES, strict=True))
)
_V2S = EfficientNetVariant(stacks=V2_S, stem_channels=24, pretrained=_source("", 288, 1.0))
_V2M = EfficientNetVariant(stacks=V2_M, stem_channels=24, pretrained=_source("", 320, 1.0))

VARIANTS: dict[str, EfficientNetVariant] = {
    **{f"efficientnet_b{index}": variant for index, variant in enumerate(_B)},
    **{f"efficientnet_lite{index}": variant for index, variant in enumerate(_LITE)},
    "efficientnetv2_s": _V2S,
    "efficientnetv2_m": _V2M,
    **{
        f"tf_efficientnet_b{index}": _tf(variant, _source("ns_jft_in1k", *_TF_SIZES[index]))
        for index, variant in enumerate(_B)
    },
    **{
        f"tf_efficientnet_lite{index}": _tf(variant, source)
        for index, (variant, source) in enumerate(zip(_LITE, _TF_LITE_SOURCES, strict=True))
    },
    "tf_efficientnetv2_s": _tf(_V2S, _source("in21k_ft_in1k", 300, 1.0, mean=HALF)),
    "tf_efficientnetv2_m": _tf(_V2M, _source("in21k_ft_in1k", 384, 1.0, mean=HALF, crop_mode="squash")),
}

Block = ConvBnAct | DepthwiseSeparable | InvertedResidual | EdgeResidual


def _block(stack: BlockStack, channels: tuple[int, int], stride: int, dilation: int, style: ConvStyle) -> Block:
    in_channels, out_channels = channels
    mid = make_divisible(in_channels * stack.expansion)
    if stack.kind == "conv":
        return ConvBnAct(
            in_channels, out_channels, stack.kernel, stride=stride, dilation=dilation, style=style, skip=True
        )
    if stack.kind == "separable":
        return DepthwiseSeparable(
            in_channels,
            out_channels,
            stack.kernel,
            stride=stride,
            dilation=dilation,
            style=style,
            se_channels=round(in_channels * stack.se_ratio),
        )
    kind = InvertedResidual if stack.kind == "inverted" else EdgeResidual
    return kind(
        in_channels,
        out_channels,
        stack.kernel,
        mid_channels=mid,
        stride=stride,
        dilation=dilation,
        style=style,
        se_channels=round(mid * stack.se_ratio / stack.expansion),
    )


class EfficientNet(BaseBackbone):
    """A stride-2 stem and stacks of blocks; a level ends where the next stack has a stride."""

    family = "efficientnet"
    variants: ClassVar[Mapping[str, EfficientNetVariant]] = VARIANTS
    output_strides = (8, 16, 32)
    architecture_fields = ("padding", "bn_eps")

    def __init__(self, name: str, options: BackboneOptions) -> None:
        super().__init__(name, options)
        architecture: dict[str, Any] = dict(options.architecture)  # fields of the variant
        variant = replace(self.variants[name], **architecture)
        style = variant.style
        stem = variant.stem_channels if variant.lite else variant.scaled(variant.stem_channels)
        head = 1280 if variant.lite else variant.scaled(1280)
        self.conv_stem = conv2d(options.in_channels, stem, 3, stride=2, padding=variant.padding)
        self.bn1 = BatchNormAct2d(stem, style)
        self.blocks, levels, self._level_ends = self._build(variant, stem)
        self.conv_head = conv2d(levels[-1].channels, head, 1)
        self.bn2 = BatchNormAct2d(head, style)
        self.classifier = nn.Linear(head, options.num_classes) if options.num_classes else nn.Identity()
        init_weights(self)
        self.finish(levels, pretrained=variant.pretrained)

    def _build(
        self, variant: EfficientNetVariant, channels: int
    ) -> tuple[nn.Sequential, list[FeatureLevel], tuple[int, ...]]:
        """Return the stacks, the levels, and the number of stacks before the end of each level."""
        field = ReceptiveField().conv(3, 2)
        plan = DilationPlan(output_stride=self.options.output_stride, stride=2)
        stacks, ends = nn.Sequential(), []
        levels: list[FeatureLevel] = []
        for position, stack in enumerate(variant.stacks):
            dilation = plan.dilation
            plan, stride, later_dilation = plan.next(stack.stride)
            blocks = nn.Sequential()
            out_channels = variant.scaled(stack.channels)
            for _ in range(variant.repeats(position)):
                block = _block(stack, (channels, out_channels), stride, dilation, variant.style)
                blocks.append(block)
                field = block.receptive_field(field)
                channels, stride, dilation = out_channels, 1, later_dilation
            stacks.append(blocks)
            following = variant.stacks[position + 1 : position + 2]
            if not following or following[0].stride > 1:
                index = len(levels)
                levels.append(
                    FeatureLevel(
                        name=f"stage{index}" if index else "stem",
                        index=index,
                        channels=channels,
                        stride=plan.stride,
                        receptive_field=field.pixels,
                    )
                )
                ends.append(position + 1)
        return stacks, levels, tuple(ends)

    def forward_levels(self, images: Tensor, depth: int) -> tuple[list[Tensor], Tensor]:
        """See the base: the first level is the first stack, at the stem's stride."""
        features = self.bn1(self.conv_stem(images))
        maps = []
        ends = self._level_ends[:depth]
        for count, stack in enumerate(list(self.blocks.children())[: ends[-1]], 1):
            for block in stack.children():
                features = self.run_stage(block, features)
            if count in ends:
                maps.append(features)
        return maps, features

    def forward_head(self, trunk: Tensor) -> Tensor:
        """Return 1x1 convolution, mean over the map, classifier."""
        features = self.bn2(self.conv_head(trunk))
        output: Tensor = self.classifier(features.mean((2, 3)))
        return output

    def stage_modules(self) -> dict[str, tuple[nn.Module, ...]]:
        """See the base."""
        stacks = tuple(self.blocks.children())
        starts = (0, *self._level_ends)
        stages: dict[str, tuple[nn.Module, ...]] = {
            level.name: stacks[start:end]
            for level, start, end in zip(self.all_levels, starts, self._level_ends, strict=False)
        }
        return {**stages, "stem": (self.conv_stem, self.bn1, *stages["stem"])}
