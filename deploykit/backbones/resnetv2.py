"""ResNet with pre-activation, with timm's parameter names; its stem and stages also serve hybrid ViTs.

He et al. 2016, "Identity Mappings in Deep Residual Networks", with the stride in the 3x3 convolution.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, TypeAlias

import torch.nn.functional as F
from torch import Tensor, nn

from deploykit.backbones.base import BackboneOptions, BaseBackbone, PretrainedSource
from deploykit.backbones.features import DilationPlan, ReceptiveField
from deploykit.backbones.inverted_residual import BatchNormAct2d, ConvStyle, conv2d, make_divisible, relu, same_padding
from deploykit.backbones.resnet import ShortcutPool
from deploykit.spec import FeatureLevel, Preprocessing

StemType: TypeAlias = Literal["plain", "same", "deep", "deep_same"]


class ConvFactory(Protocol):
    """Makes a convolution that keeps ``ceil(size / stride)`` pixels a side."""

    def __call__(
        self, in_channels: int, out_channels: int, kernel: int, *, stride: int = 1, dilation: int = 1
    ) -> nn.Module:
        """Return a convolution without bias."""


NormFactory: TypeAlias = Callable[[int, bool], nn.Module]
"""``(channels, activate)`` to a norm layer that ends with its activation where asked."""


def batch_norm_relu(channels: int, activate: bool) -> nn.Module:
    """BatchNorm, and ReLU where asked."""
    return BatchNormAct2d(channels, ConvStyle(activation=relu), activate=activate)


@dataclass(frozen=True, kw_only=True)
class LayerTypes:
    """What blocks are made of; ``preactivated`` chooses norm-before-convolution."""

    conv: ConvFactory = conv2d
    norm: NormFactory = batch_norm_relu
    preactivated: bool = True


@dataclass(frozen=True, kw_only=True)
class ResNetV2Variant:
    """An architecture: blocks a stage, and where its default weights come from."""

    depths: tuple[int, ...] = (3, 4, 6, 3)
    channels: tuple[int, ...] = (256, 512, 1024, 2048)
    stem_type: StemType = "plain"
    avg_down: bool = False
    layers: LayerTypes = LayerTypes()
    pretrained: PretrainedSource | None = None


_A1H = PretrainedSource(
    tag="a1h_in1k", preprocessing=Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), crop_pct=0.95)
)

VARIANTS: dict[str, ResNetV2Variant] = {
    "resnetv2_50": ResNetV2Variant(pretrained=_A1H),
    "resnetv2_101": ResNetV2Variant(depths=(3, 4, 23, 3), pretrained=_A1H),
}


class MaxPool2dSame(nn.Module):
    """3x3 stride-2 max pooling with TensorFlow's SAME padding."""

    def forward(self, features: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to ``(N, C, ceil(H / 2), ceil(W / 2))``."""
        height, width = features.shape[2:]
        top, bottom = same_padding(height, 3, 2, 1)
        left, right = same_padding(width, 3, 2, 1)
        return F.max_pool2d(F.pad(features, (left, right, top, bottom), value=float("-inf")), 3, 2)


def make_stem(in_channels: int, out_channels: int, stem_type: StemType, layers: LayerTypes) -> nn.Sequential:
    """Return the stem as timm names its parts: ``(N, C, H, W)`` to ``(N, out_channels, H/4, W/4)``."""
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    if stem_type.startswith("deep"):
        half = out_channels // 2
        parts["conv1"] = layers.conv(in_channels, half, 3, stride=2)
        parts["norm1"] = layers.norm(half, True)
        parts["conv2"] = layers.conv(half, half, 3)
        parts["norm2"] = layers.norm(half, True)
        parts["conv3"] = layers.conv(half, out_channels, 3)
        if not layers.preactivated:
            parts["norm3"] = layers.norm(out_channels, True)
    else:
        parts["conv"] = layers.conv(in_channels, out_channels, 7, stride=2)
        if not layers.preactivated:
            parts["norm"] = layers.norm(out_channels, True)
    parts["pool"] = MaxPool2dSame() if stem_type.endswith("same") else nn.MaxPool2d(3, stride=2, padding=1)
    return nn.Sequential(parts)


def stem_field(stem_type: StemType) -> ReceptiveField:
    """Return the receptive field before the stem's pooling."""
    if stem_type.startswith("deep"):
        return ReceptiveField().conv(3, 2).conv(3).conv(3)
    return ReceptiveField().conv(7, 2)


@dataclass(frozen=True, kw_only=True)
class _BlockPlan:
    """Where a block stands: ``first_dilation`` is that of its strided convolution."""

    in_channels: int
    out_channels: int
    stride: int = 1
    dilation: int = 1
    first_dilation: int = 1
    avg_down: bool = False
    projects: bool = False


class Downsample(nn.Module):
    """The shortcut's projection, 1x1, after 2x2 average pooling where ``avg_down``."""

    def __init__(self, block: _BlockPlan, layers: LayerTypes) -> None:
        super().__init__()
        stride = 1 if block.avg_down else block.stride
        pools = block.avg_down and (block.stride > 1 or block.dilation > 1)
        self.pool = ShortcutPool(block.stride) if pools else nn.Identity()
        self.conv = layers.conv(block.in_channels, block.out_channels, 1, stride=stride)
        self.norm = nn.Identity() if layers.preactivated else layers.norm(block.out_channels, False)

    def forward(self, features: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to ``(N, D, H/stride, W/stride)``."""
        output: Tensor = self.norm(self.conv(self.pool(features)))
        return output


class PreActBottleneck(nn.Module):
    """Norm before each of the 1x1, 3x3, 1x1 convolutions; the sum has no activation."""

    def __init__(self, block: _BlockPlan, layers: LayerTypes) -> None:
        super().__init__()
        width = make_divisible(block.out_channels / 4)
        self.downsample = Downsample(block, layers) if block.projects else None
        self.norm1 = layers.norm(block.in_channels, True)
        self.conv1 = layers.conv(block.in_channels, width, 1)
        self.norm2 = layers.norm(width, True)
        self.conv2 = layers.conv(width, width, 3, stride=block.stride, dilation=block.first_dilation)
        self.norm3 = layers.norm(width, True)
        self.conv3 = layers.conv(width, block.out_channels, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to ``(N, D, H/stride, W/stride)``."""
        normed = self.norm1(features)
        shortcut = features if self.downsample is None else self.downsample(normed)
        output = self.conv2(self.norm2(self.conv1(normed)))
        output = self.conv3(self.norm3(output))
        result: Tensor = output + shortcut
        return result


class Bottleneck(nn.Module):
    """The block without pre-activation, in this family's names: what hybrid ViTs use."""

    def __init__(self, block: _BlockPlan, layers: LayerTypes) -> None:
        super().__init__()
        width = make_divisible(block.out_channels / 4)
        self.downsample = Downsample(block, layers) if block.projects else None
        self.conv1 = layers.conv(block.in_channels, width, 1)
        self.norm1 = layers.norm(width, True)
        self.conv2 = layers.conv(width, width, 3, stride=block.stride, dilation=block.first_dilation)
        self.norm2 = layers.norm(width, True)
        self.conv3 = layers.conv(width, block.out_channels, 1)
        self.norm3 = layers.norm(block.out_channels, False)
        self.act3 = nn.ReLU(inplace=True)

    def forward(self, features: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to ``(N, D, H/stride, W/stride)``."""
        shortcut = features if self.downsample is None else self.downsample(features)
        output = self.norm2(self.conv2(self.norm1(self.conv1(features))))
        output = self.norm3(self.conv3(output))
        result: Tensor = self.act3(output + shortcut)
        return result


class Stage(nn.Module):
    """Blocks of one width; the first one has the stride and the projection."""

    def __init__(self, first: _BlockPlan, depth: int, layers: LayerTypes) -> None:
        super().__init__()
        block_type = PreActBottleneck if layers.preactivated else Bottleneck
        width = first.out_channels
        later = _BlockPlan(
            in_channels=width, out_channels=width, dilation=first.dilation, first_dilation=first.dilation
        )
        self.blocks = nn.Sequential(*(block_type(first if not index else later, layers) for index in range(depth)))
        self.plan, self.depth = first, depth

    def forward(self, features: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to ``(N, D, H/stride, W/stride)``."""
        output: Tensor = self.blocks(features)
        return output

    def receptive_field(self, field: ReceptiveField) -> ReceptiveField:
        """Return the field after this stage."""
        field = field.conv(3, self.plan.stride, self.plan.first_dilation)
        for _ in range(self.depth - 1):
            field = field.conv(3, 1, self.plan.dilation)
        return field


def make_stages(
    in_channels: int,
    channels: Sequence[int],
    depths: Sequence[int],
    *,
    layers: LayerTypes,
    avg_down: bool = False,
    output_stride: int = 32,
) -> tuple[nn.Sequential, tuple[int, ...]]:
    """Return the stages after a stride-4 stem, and their strides in input pixels."""
    plan = DilationPlan(output_stride=output_stride, stride=4)
    stages, strides = nn.Sequential(), []
    for index, (width, depth) in enumerate(zip(channels, depths, strict=True)):
        first_dilation = plan.dilation
        plan, stride, dilation = plan.next(2 if index else 1)
        first = _BlockPlan(
            in_channels=in_channels,
            out_channels=width,
            stride=stride,
            dilation=dilation,
            first_dilation=first_dilation,
            avg_down=avg_down,
            projects=True,
        )
        stages.append(Stage(first, depth, layers))
        strides.append(plan.stride)
        in_channels = width
    return stages, tuple(strides)


class _Head(nn.Module):
    """Mean over the map, then a 1x1 convolution as the classifier."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.fc: nn.Module = nn.Identity()
        if num_classes:
            self.fc = nn.Conv2d(channels, num_classes, 1)
            nn.init.normal_(self.fc.weight, std=0.01)

    def forward(self, features: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to ``(N, num_classes)``, or ``(N, C)`` without classifier."""
        output: Tensor = self.fc(features.mean((2, 3), keepdim=True))
        return output.flatten(1)


class ResNetV2(BaseBackbone):
    """Four stages of pre-activation blocks; the last norm belongs to the head."""

    family = "resnetv2"
    variants: ClassVar[Mapping[str, ResNetV2Variant]] = VARIANTS
    output_strides = (8, 16, 32)

    def __init__(self, name: str, options: BackboneOptions) -> None:
        super().__init__(name, options)
        variant = self.variants[name]
        self.stem = make_stem(options.in_channels, 64, variant.stem_type, variant.layers)
        self.stages, strides = make_stages(
            64,
            variant.channels,
            variant.depths,
            layers=variant.layers,
            avg_down=variant.avg_down,
            output_stride=options.output_stride,
        )
        self.norm = variant.layers.norm(variant.channels[-1], True) if variant.layers.preactivated else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.head = _Head(variant.channels[-1], options.num_classes)
        self.finish(self._levels(variant, strides), pretrained=variant.pretrained)

    def _levels(self, variant: ResNetV2Variant, strides: tuple[int, ...]) -> list[FeatureLevel]:
        field = stem_field(variant.stem_type)
        levels = [FeatureLevel(name="stem", index=0, channels=64, stride=2, receptive_field=field.pixels)]
        field = field.conv(3, 2)
        for index, stage in enumerate(self._stages(), 1):
            field = stage.receptive_field(field)
            levels.append(
                FeatureLevel(
                    name=f"stage{index}",
                    index=index,
                    channels=variant.channels[index - 1],
                    stride=strides[index - 1],
                    receptive_field=field.pixels,
                )
            )
        return levels

    def _stages(self) -> tuple[Stage, ...]:
        return tuple(self.stages)  # type: ignore[arg-type]

    def forward_levels(self, images: Tensor, depth: int) -> tuple[list[Tensor], Tensor]:
        """See the base: the stem before its pooling, then the stages before the last norm."""
        *before, pool = self.stem
        features = images
        for part in before:
            features = part(features)
        maps = [features]
        for index, stage in enumerate(self._stages()[: depth - 1]):
            if index == 0:
                features = pool(features)
            for block in stage.blocks:
                features = self.run_stage(block, features)
            maps.append(features)
        return maps, features

    def forward_head(self, trunk: Tensor) -> Tensor:
        """Return the last norm, the mean over the map, then the classifier."""
        output: Tensor = self.head(self.norm(trunk))
        return output

    def stage_modules(self) -> dict[str, tuple[nn.Module, ...]]:
        """See the base."""
        stages = {f"stage{index}": (stage,) for index, stage in enumerate(self._stages(), 1)}
        return {"stem": (self.stem,), **stages}
