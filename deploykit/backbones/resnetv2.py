"""ResNet with pre-activation, with timm's parameter names.

He et al. 2016, "Identity Mappings in Deep Residual Networks", with the stride in the 3x3 convolution.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from deploykit.backbones.base import BackboneOptions, BaseBackbone, PretrainedSource
from deploykit.backbones.features import DilationPlan, ReceptiveField
from deploykit.backbones.inverted_residual import BatchNormAct2d, ConvStyle, conv2d, make_divisible, relu
from deploykit.spec import FeatureLevel, Preprocessing


def batch_norm_relu(channels: int) -> BatchNormAct2d:
    """Return a BatchNorm that ends with a ReLU."""
    return BatchNormAct2d(channels, ConvStyle(activation=relu))


@dataclass(frozen=True, kw_only=True)
class ResNetV2Variant:
    """An architecture: blocks a stage, and where its default weights come from."""

    depths: tuple[int, ...] = (3, 4, 6, 3)
    channels: tuple[int, ...] = (256, 512, 1024, 2048)
    pretrained: PretrainedSource | None = None


_A1H = PretrainedSource(
    tag="a1h_in1k", preprocessing=Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), crop_pct=0.95)
)

VARIANTS: dict[str, ResNetV2Variant] = {
    "resnetv2_50": ResNetV2Variant(pretrained=_A1H),
    "resnetv2_101": ResNetV2Variant(depths=(3, 4, 23, 3), pretrained=_A1H),
}


def make_stem(in_channels: int, out_channels: int) -> nn.Sequential:
    """Return the stem as timm names its parts: ``(N, C, H, W)`` to ``(N, out_channels, H/4, W/4)``."""
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    parts["conv"] = conv2d(in_channels, out_channels, 7, stride=2)
    parts["pool"] = nn.MaxPool2d(3, stride=2, padding=1)
    return nn.Sequential(parts)


@dataclass(frozen=True, kw_only=True)
class _BlockPlan:
    """Where a block stands: ``first_dilation`` is that of its strided convolution."""

    in_channels: int
    out_channels: int
    stride: int = 1
    dilation: int = 1
    first_dilation: int = 1
    projects: bool = False


class Downsample(nn.Module):
    """The shortcut's projection, 1x1."""

    def __init__(self, block: _BlockPlan) -> None:
        super().__init__()
        self.conv = conv2d(block.in_channels, block.out_channels, 1, stride=block.stride)

    def forward(self, features: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to ``(N, D, H/stride, W/stride)``."""
        output: Tensor = self.conv(features)
        return output


class PreActBottleneck(nn.Module):
    """Norm before each of the 1x1, 3x3, 1x1 convolutions; the sum has no activation."""

    def __init__(self, block: _BlockPlan) -> None:
        super().__init__()
        width = make_divisible(block.out_channels / 4)
        self.downsample = Downsample(block) if block.projects else None
        self.norm1 = batch_norm_relu(block.in_channels)
        self.conv1 = conv2d(block.in_channels, width, 1)
        self.norm2 = batch_norm_relu(width)
        self.conv2 = conv2d(width, width, 3, stride=block.stride, dilation=block.first_dilation)
        self.norm3 = batch_norm_relu(width)
        self.conv3 = conv2d(width, block.out_channels, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to ``(N, D, H/stride, W/stride)``."""
        normed = self.norm1(features)
        shortcut = features if self.downsample is None else self.downsample(normed)
        output = self.conv2(self.norm2(self.conv1(normed)))
        output = self.conv3(self.norm3(output))
        result: Tensor = output + shortcut
        return result


class Stage(nn.Module):
    """Blocks of one width, run one by one; the first one has the stride and the projection."""

    def __init__(self, first: _BlockPlan, depth: int) -> None:
        super().__init__()
        width = first.out_channels
        later = _BlockPlan(
            in_channels=width, out_channels=width, dilation=first.dilation, first_dilation=first.dilation
        )
        self.blocks = nn.Sequential(*(PreActBottleneck(first if not index else later) for index in range(depth)))
        self.plan, self.depth = first, depth

    def receptive_field(self, field: ReceptiveField) -> ReceptiveField:
        """Return the field after this stage."""
        field = field.conv(3, self.plan.stride, self.plan.first_dilation)
        for _ in range(self.depth - 1):
            field = field.conv(3, 1, self.plan.dilation)
        return field


def make_stages(
    in_channels: int, channels: Sequence[int], depths: Sequence[int], *, output_stride: int = 32
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
            projects=True,
        )
        stages.append(Stage(first, depth))
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
        self.stem = make_stem(options.in_channels, 64)
        self.stages, strides = make_stages(64, variant.channels, variant.depths, output_stride=options.output_stride)
        self.norm = batch_norm_relu(variant.channels[-1])
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.head = _Head(variant.channels[-1], options.num_classes)
        self.finish(self._levels(variant, strides), pretrained=variant.pretrained)

    def _levels(self, variant: ResNetV2Variant, strides: tuple[int, ...]) -> list[FeatureLevel]:
        field = ReceptiveField().conv(7, 2)
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
        conv, pool = self.stem
        features = conv(images)
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
