"""MobileNet V2, V3 and V4 (the convolutional ones).

Sandler et al. 2018, "MobileNetV2: Inverted Residuals and Linear Bottlenecks"; Howard et al. 2019,
"Searching for MobileNetV3"; Qin et al. 2024, "MobileNetV4: Universal Models for the Mobile Ecosystem".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, TypeAlias, TypedDict

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
    ModuleFactory,
    conv2d,
    init_weights,
    make_divisible,
    relu,
    relu6,
)
from deploykit.backbones.universal_inverted_residual import UniversalInvertedResidual
from deploykit.spec import FeatureLevel, Preprocessing

_SE_RATIO = 0.25


class _Common(TypedDict):
    style: ConvStyle
    stride: int
    dilation: int


Block: TypeAlias = ConvBnAct | DepthwiseSeparable | InvertedResidual | EdgeResidual | UniversalInvertedResidual


def hardswish() -> nn.Module:
    """Return ``x * min(max(x + 3, 0), 6) / 6``."""
    return nn.Hardswish(inplace=True)


@dataclass(frozen=True, kw_only=True)
class BlockSpec:
    """``repeat`` blocks of one kind, of which the first carries the stride.

    ``channels`` is the output at width 1. ``expand`` is the inner width over the input's. ``se``
    puts squeeze-and-excitation inside; ``relu`` uses ReLU in place of the network's activation.
    ``start_kernel`` is that of a universal block's first depthwise convolution, whose middle one
    has ``kernel``; 0 leaves either out.
    """

    kind: Literal["conv", "depthwise", "inverted", "edge", "universal"]
    channels: int
    kernel: int
    stride: int
    expand: float = 1.0
    repeat: int = 1
    se: bool = False
    relu: bool = False
    start_kernel: int = 0


@dataclass(frozen=True, kw_only=True)
class MobileNetVariant:
    """One MobileNet: its stacks of blocks, and what multiplies all their widths.

    ``stem`` is the stem's channels at width 1, ``features`` the embedding's as they are.
    ``generation`` decides the head: 2 expands, normalises and pools; 3 pools and expands with a
    bias; 4 pools, expands and normalises.
    """

    generation: Literal[2, 3, 4]
    stacks: tuple[tuple[BlockSpec, ...], ...]
    width: float = 1.0
    stem: int
    features: int
    activation: ModuleFactory
    pretrained: PretrainedSource | None


def _conv(kernel: int, stride: int, channels: int) -> BlockSpec:
    return BlockSpec(kind="conv", kernel=kernel, stride=stride, channels=channels)


def _depthwise(kernel: int, stride: int, channels: int, *, se: bool = False, relu: bool = False) -> BlockSpec:
    return BlockSpec(kind="depthwise", kernel=kernel, stride=stride, channels=channels, se=se, relu=relu)


def _inverted(
    kernel: int, stride: int, expand: float, channels: int, *, repeat: int = 1, se: bool = False, relu: bool = False
) -> BlockSpec:
    return BlockSpec(
        kind="inverted",
        kernel=kernel,
        stride=stride,
        expand=expand,
        channels=channels,
        repeat=repeat,
        se=se,
        relu=relu,
    )


def _edge(kernel: int, stride: int, expand: float, channels: int) -> BlockSpec:
    return BlockSpec(kind="edge", kernel=kernel, stride=stride, expand=expand, channels=channels)


def _universal(
    start_kernel: int, kernel: int, stride: int, expand: float, channels: int, *, repeat: int = 1
) -> BlockSpec:
    return BlockSpec(
        kind="universal",
        start_kernel=start_kernel,
        kernel=kernel,
        stride=stride,
        expand=expand,
        channels=channels,
        repeat=repeat,
    )


_V2 = (
    (_depthwise(3, 1, 16),),
    (_inverted(3, 2, 6, 24, repeat=2),),
    (_inverted(3, 2, 6, 32, repeat=3),),
    (_inverted(3, 2, 6, 64, repeat=4),),
    (_inverted(3, 1, 6, 96, repeat=3),),
    (_inverted(3, 2, 6, 160, repeat=3),),
    (_inverted(3, 1, 6, 320),),
)
_V3_SMALL = (
    (_depthwise(3, 2, 16, se=True, relu=True),),
    (_inverted(3, 2, 4.5, 24, relu=True), _inverted(3, 1, 3.67, 24, relu=True)),
    (_inverted(5, 2, 4, 40, se=True), _inverted(5, 1, 6, 40, repeat=2, se=True)),
    (_inverted(5, 1, 3, 48, repeat=2, se=True),),
    (_inverted(5, 2, 6, 96, repeat=3, se=True),),
    (_conv(1, 1, 576),),
)
_V3_LARGE = (
    (_depthwise(3, 1, 16, relu=True),),
    (_inverted(3, 2, 4, 24, relu=True), _inverted(3, 1, 3, 24, relu=True)),
    (_inverted(5, 2, 3, 40, repeat=3, se=True, relu=True),),
    (_inverted(3, 2, 6, 80), _inverted(3, 1, 2.5, 80), _inverted(3, 1, 2.3, 80, repeat=2)),
    (_inverted(3, 1, 6, 112, repeat=2, se=True),),
    (_inverted(5, 2, 6, 160, repeat=3, se=True),),
    (_conv(1, 1, 960),),
)
_V4_SMALL = (
    (_conv(3, 2, 32), _conv(1, 1, 32)),
    (_conv(3, 2, 96), _conv(1, 1, 64)),
    (_universal(5, 5, 2, 3, 96), _universal(0, 3, 1, 2, 96, repeat=4), _universal(3, 0, 1, 4, 96)),
    (
        _universal(3, 3, 2, 6, 128),
        _universal(5, 5, 1, 4, 128),
        _universal(0, 5, 1, 4, 128),
        _universal(0, 5, 1, 3, 128),
        _universal(0, 3, 1, 4, 128, repeat=2),
    ),
    (_conv(1, 1, 960),),
)
_V4_MEDIUM = (
    (_edge(3, 2, 4, 48),),
    (_universal(3, 5, 2, 4, 80), _universal(3, 3, 1, 2, 80)),
    (
        _universal(3, 5, 2, 6, 160),
        _universal(3, 3, 1, 4, 160, repeat=2),
        _universal(3, 5, 1, 4, 160),
        _universal(3, 3, 1, 4, 160),
        _universal(3, 0, 1, 4, 160),
        _universal(0, 0, 1, 2, 160),
        _universal(3, 0, 1, 4, 160),
    ),
    (
        _universal(5, 5, 2, 6, 256),
        _universal(5, 5, 1, 4, 256),
        _universal(3, 5, 1, 4, 256, repeat=2),
        _universal(0, 0, 1, 4, 256),
        _universal(3, 0, 1, 4, 256),
        _universal(3, 5, 1, 2, 256),
        _universal(5, 5, 1, 4, 256),
        _universal(0, 0, 1, 4, 256, repeat=2),
        _universal(5, 0, 1, 2, 256),
    ),
    (_conv(1, 1, 960),),
)
_V4_LARGE = (
    (_edge(3, 2, 4, 48),),
    (_universal(3, 5, 2, 4, 96), _universal(3, 3, 1, 4, 96)),
    (
        _universal(3, 5, 2, 4, 192),
        _universal(3, 3, 1, 4, 192, repeat=3),
        _universal(3, 5, 1, 4, 192),
        _universal(5, 3, 1, 4, 192, repeat=5),
        _universal(3, 0, 1, 4, 192),
    ),
    (
        _universal(5, 5, 2, 4, 512),
        _universal(5, 5, 1, 4, 512, repeat=3),
        _universal(5, 0, 1, 4, 512),
        _universal(5, 3, 1, 4, 512),
        _universal(5, 0, 1, 4, 512, repeat=2),
        _universal(5, 3, 1, 4, 512),
        _universal(5, 5, 1, 4, 512),
        _universal(5, 0, 1, 4, 512, repeat=3),
    ),
    (_conv(1, 1, 960),),
)


def _v2(width: float, tag: str) -> MobileNetVariant:
    return MobileNetVariant(
        generation=2,
        stacks=_V2,
        width=width,
        stem=32,
        features=max(1280, make_divisible(1280 * width)),
        activation=relu6,
        pretrained=PretrainedSource(tag=tag),
    )


def _v3(
    stacks: tuple[tuple[BlockSpec, ...], ...], features: int, tag: str | None, *, width: float = 1.0
) -> MobileNetVariant:
    return MobileNetVariant(
        generation=3,
        stacks=stacks,
        width=width,
        stem=16,
        features=features,
        activation=hardswish,
        pretrained=PretrainedSource(tag=tag) if tag else None,
    )


def _v4(
    stacks: tuple[tuple[BlockSpec, ...], ...], stem: int, tag: str, *, side: int, crop_pct: float = 0.95
) -> MobileNetVariant:
    return MobileNetVariant(
        generation=4,
        stacks=stacks,
        stem=stem,
        features=1280,
        activation=relu,
        pretrained=PretrainedSource(tag=tag, image_size=(side, side), preprocessing=Preprocessing(crop_pct=crop_pct)),
    )


VARIANTS: dict[str, MobileNetVariant] = {
    "mobilenetv2_050": _v2(0.5, "lamb_in1k"),
    "mobilenetv2_100": _v2(1.0, "ra_in1k"),
    "mobilenetv2_140": _v2(1.4, "ra_in1k"),
    "mobilenetv3_small_075": _v3(_V3_SMALL, 1024, "lamb_in1k", width=0.75),
    "mobilenetv3_small_100": _v3(_V3_SMALL, 1024, "lamb_in1k"),
    "mobilenetv3_large_075": _v3(_V3_LARGE, 1280, None, width=0.75),
    "mobilenetv3_large_100": _v3(_V3_LARGE, 1280, "ra_in1k"),
    "mobilenetv4_conv_small": _v4(_V4_SMALL, 32, "e2400_r224_in1k", side=224, crop_pct=0.875),
    "mobilenetv4_conv_medium": _v4(_V4_MEDIUM, 32, "e500_r256_in1k", side=256),
    "mobilenetv4_conv_large": _v4(_V4_LARGE, 24, "e600_r384_in1k", side=384),
}


class MobileNet(BaseBackbone):
    """MobileNet, with levels ``stem`` (stride 2) and ``stage1`` to ``stage4`` (strides 4 to 32).

    A level ends where the next stack of blocks strides, so it may hold two stacks; in V2 and V3
    large the stem's level holds the first one.
    """

    family: ClassVar[str] = "mobilenet"
    variants: ClassVar[Mapping[str, MobileNetVariant]] = VARIANTS
    output_strides: ClassVar[tuple[int, ...]] = (8, 16, 32)

    def __init__(self, name: str, options: BackboneOptions) -> None:
        super().__init__(name, options)
        variant = self.variants[name]
        style = ConvStyle(activation=variant.activation, se_activation=relu, se_gate=nn.Hardsigmoid)
        channels = make_divisible(variant.stem * variant.width)
        self.conv_stem = conv2d(options.in_channels, channels, 3, stride=2)
        self.bn1 = BatchNormAct2d(channels, style)
        field = ReceptiveField().conv(3, stride=2)
        plan = DilationPlan(output_stride=options.output_stride, stride=2)

        self.blocks = nn.Sequential()
        # The stacks of each level; those before the first stride belong to the stem.
        self._level_stacks: list[list[int]] = [[]]
        levels: list[FeatureLevel] = []
        for index, stack in enumerate(variant.stacks):
            if stack[0].stride > 1:
                levels.append(_level(len(levels), channels, plan, field))
                self._level_stacks.append([])
            blocks, channels, plan, field = _build_stack(
                channels, stack, width=variant.width, style=style, plan=plan, field=field
            )
            self.blocks.append(blocks)
            self._level_stacks[-1].append(index)
        levels.append(_level(len(levels), channels, plan, field))

        self._build_head(channels, variant, style)
        init_weights(self)
        self.finish(levels, pretrained=variant.pretrained)

    def _build_head(self, channels: int, variant: MobileNetVariant, style: ConvStyle) -> None:
        classes, features = self.options.num_classes, variant.features
        self.conv_head = conv2d(channels, features, 1, bias=variant.generation == 3)
        if variant.generation == 2:
            self.bn2 = BatchNormAct2d(features, style)
        else:
            self.norm_head = BatchNormAct2d(features, style) if variant.generation == 4 else nn.Identity()
            self.act2 = variant.activation() if variant.generation == 3 else nn.Identity()
        self.classifier = nn.Linear(features, classes) if classes else nn.Identity()

    def forward_levels(self, images: Tensor, depth: int) -> tuple[list[Tensor], Tensor]:
        """See `BaseBackbone.forward_levels`; the state is the last map."""
        maps: list[Tensor] = []
        features = images
        for modules in list(self.stage_modules().values())[:depth]:
            for module in modules:
                features = self.run_stage(module, features)
            maps.append(features)
        return maps, features

    def forward_head(self, trunk: Tensor) -> Tensor:
        """Map ``(N, C, H/32, W/32)`` to ``(N, num_classes)`` logits, or the ``(N, features)`` embedding."""
        if self.variants[self.name].generation == 2:
            pooled = self.bn2(self.conv_head(trunk)).mean((2, 3))
        else:
            head = self.conv_head(trunk.mean((2, 3), keepdim=True))
            pooled = self.act2(self.norm_head(head)).flatten(1)
        output: Tensor = self.classifier(pooled)
        return output

    def stage_modules(self) -> dict[str, tuple[nn.Module, ...]]:
        """Return the stem with its convolution and norm, and the stacks of blocks of each level."""
        stacks = [tuple(self.blocks[index] for index in indices) for indices in self._level_stacks]
        stages = {f"stage{index}": modules for index, modules in enumerate(stacks[1:], 1)}
        return {"stem": (self.conv_stem, self.bn1, *stacks[0]), **stages}


def _level(index: int, channels: int, plan: DilationPlan, field: ReceptiveField) -> FeatureLevel:
    name = f"stage{index}" if index else "stem"
    return FeatureLevel(name=name, index=index, channels=channels, stride=plan.stride, receptive_field=field.pixels)


def _build_stack(
    channels: int,
    stack: tuple[BlockSpec, ...],
    *,
    width: float,
    style: ConvStyle,
    plan: DilationPlan,
    field: ReceptiveField,
) -> tuple[nn.Sequential, int, DilationPlan, ReceptiveField]:
    """Return the blocks of one stack, and channels, plan and field after it."""
    blocks = nn.Sequential()
    for spec in stack:
        out_channels = make_divisible(spec.channels * width)
        block_style = replace(style, activation=relu) if spec.relu else style
        for repeat in range(spec.repeat):
            # A block whose stride became dilation still has the dilation before it.
            dilation = plan.dilation
            plan, stride, _ = plan.next(spec.stride if repeat == 0 else 1)
            block = _build_block(spec, channels, out_channels, style=block_style, stride=stride, dilation=dilation)
            blocks.append(block)
            field = block.receptive_field(field)
            channels = out_channels
    return blocks, channels, plan, field


def _build_block(
    spec: BlockSpec, channels: int, out_channels: int, *, style: ConvStyle, stride: int, dilation: int
) -> Block:
    mid = make_divisible(channels * spec.expand)
    squeezed = make_divisible(mid * _SE_RATIO) if spec.se else 0
    common: _Common = {"style": style, "stride": stride, "dilation": dilation}
    match spec.kind:
        case "conv":
            return ConvBnAct(channels, out_channels, spec.kernel, **common)
        case "depthwise":
            return DepthwiseSeparable(channels, out_channels, spec.kernel, se_channels=squeezed, **common)
        case "inverted":
            return InvertedResidual(
                channels, out_channels, spec.kernel, mid_channels=mid, se_channels=squeezed, **common
            )
        case "edge":
            return EdgeResidual(channels, out_channels, spec.kernel, mid_channels=mid, **common)
        case "universal":
            return UniversalInvertedResidual(
                channels, out_channels, spec.kernel, start_kernel=spec.start_kernel, mid_channels=mid, **common
            )
