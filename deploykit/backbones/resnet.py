"""ResNet, ResNeXt, Wide ResNet, ResNet-D and SE-ResNet, with timm's parameter names.

He et al. 2015, "Deep Residual Learning"; Xie et al. 2016, "Aggregated Residual Transformations";
Zagoruyko and Komodakis 2016, "Wide Residual Networks"; He et al. 2018, "Bag of Tricks" (the D stem
and the average pooling in the shortcut); Hu et al. 2018, "Squeeze-and-Excitation Networks".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from deploykit.backbones.base import BackboneOptions, BaseBackbone, PretrainedSource
from deploykit.backbones.features import DilationPlan, ReceptiveField
from deploykit.spec import FeatureLevel, Preprocessing

STAGE_PLANES = (64, 128, 256, 512)


@dataclass(frozen=True, kw_only=True)
class ResNetVariant:
    """An architecture: ``cardinality`` groups of ``base_width`` channels (at 64 planes) in each 3x3 convolution."""

    block: Literal["basic", "bottleneck"] = "bottleneck"
    depths: tuple[int, int, int, int]
    planes: tuple[int, int, int, int] = STAGE_PLANES
    cardinality: int = 1
    base_width: int = 64
    deep_stem: bool = False
    avg_down: bool = False
    squeeze_excite: bool = False
    pretrained: PretrainedSource | None = None


def _trained(tag: str, crop_pct: float = 0.95, size: int = 224) -> PretrainedSource:
    return PretrainedSource(tag=tag, preprocessing=Preprocessing(crop_pct=crop_pct), image_size=(size, size))


def _d(
    block: Literal["basic", "bottleneck"], depths: tuple[int, int, int, int], source: PretrainedSource
) -> ResNetVariant:
    return ResNetVariant(block=block, depths=depths, deep_stem=True, avg_down=True, pretrained=source)


VARIANTS: dict[str, ResNetVariant] = {
    "resnet18": ResNetVariant(block="basic", depths=(2, 2, 2, 2), pretrained=_trained("a1_in1k")),
    "resnet34": ResNetVariant(block="basic", depths=(3, 4, 6, 3), pretrained=_trained("a1_in1k")),
    "resnet50": ResNetVariant(depths=(3, 4, 6, 3), pretrained=_trained("a1_in1k")),
    "resnet101": ResNetVariant(depths=(3, 4, 23, 3), pretrained=_trained("a1h_in1k")),
    "resnet152": ResNetVariant(depths=(3, 8, 36, 3), pretrained=_trained("a1h_in1k")),
    "resnext50_32x4d": ResNetVariant(
        depths=(3, 4, 6, 3), cardinality=32, base_width=4, pretrained=_trained("a1h_in1k")
    ),
    "resnext101_32x8d": ResNetVariant(
        depths=(3, 4, 23, 3),
        cardinality=32,
        base_width=8,
        pretrained=PretrainedSource(tag="tv_in1k", preprocessing=Preprocessing(interpolation="bilinear")),
    ),
    "wide_resnet50_2": ResNetVariant(depths=(3, 4, 6, 3), base_width=128, pretrained=_trained("racm_in1k", 0.875)),
    "resnet18d": _d("basic", (2, 2, 2, 2), _trained("ra2_in1k", 0.875)),
    "resnet34d": _d("basic", (3, 4, 6, 3), _trained("ra2_in1k", 0.875)),
    "resnet50d": _d("bottleneck", (3, 4, 6, 3), _trained("ra2_in1k", 0.875)),
    "resnet101d": _d("bottleneck", (3, 4, 23, 3), _trained("ra2_in1k", 0.95, 256)),
    "seresnet50": ResNetVariant(depths=(3, 4, 6, 3), squeeze_excite=True, pretrained=_trained("a1_in1k")),
}


class SqueezeExcite(nn.Module):
    """A gate a channel from the mean of the whole map, with ``channels / 16`` hidden values."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        reduced = max(8, (channels // 16 + 4) // 8 * 8)
        self.fc1 = nn.Conv2d(channels, reduced, 1)
        self.fc2 = nn.Conv2d(reduced, channels, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to the same shape."""
        gate = F.relu(self.fc1(features.mean((2, 3), keepdim=True)))
        scale: Tensor = self.fc2(gate).sigmoid()
        return features * scale


class ShortcutPool(nn.Module):
    """2x2 average pooling before the shortcut's projection; keeps the size when ``stride`` is 1."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, features: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to ``(N, C, ceil(H / stride), ceil(W / stride))``."""
        if self.stride == 1:
            return F.avg_pool2d(F.pad(features, (0, 1, 0, 1)), 2, 1)
        odd = any(side % 2 for side in features.shape[2:])
        return F.avg_pool2d(features, 2, self.stride, ceil_mode=odd, count_include_pad=False)


def _conv3x3(in_channels: int, out_channels: int, stride: int, dilation: int, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(
        in_channels,
        out_channels,
        3,
        stride=stride,
        padding=dilation,
        dilation=dilation,
        groups=groups,
        bias=False,
    )


@dataclass(frozen=True, kw_only=True)
class _BlockPlan:
    """Where a block stands: ``first_dilation`` is that of its strided convolution."""

    in_channels: int
    planes: int
    stride: int
    dilation: int
    first_dilation: int


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion: ClassVar[int] = 1

    def __init__(self, plan: _BlockPlan, variant: ResNetVariant) -> None:
        super().__init__()
        planes = plan.planes
        self.conv1 = _conv3x3(plan.in_channels, planes, plan.stride, plan.first_dilation)
        self.bn1 = nn.BatchNorm2d(planes)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = _conv3x3(planes, planes, 1, plan.dilation)
        self.bn2 = nn.BatchNorm2d(planes)
        self.se = SqueezeExcite(planes) if variant.squeeze_excite else None
        self.act2 = nn.ReLU(inplace=True)
        self.downsample = _downsample(plan, planes, variant.avg_down)
        nn.init.zeros_(self.bn2.weight)

    def forward(self, features: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to ``(N, planes, H/stride, W/stride)``."""
        shortcut = features if self.downsample is None else self.downsample(features)
        output = self.act1(self.bn1(self.conv1(features)))
        output = self.bn2(self.conv2(output))
        if self.se is not None:
            output = self.se(output)
        result: Tensor = self.act2(output + shortcut)
        return result

    def receptive_field(self, field: ReceptiveField) -> ReceptiveField:
        """Return the field after this block."""
        field = _after(_after(field, self.conv1), self.conv2)
        return field if self.se is None else field.everywhere()


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions and a shortcut; the stride is in the 3x3 (ResNet v1.5)."""

    expansion: ClassVar[int] = 4

    def __init__(self, plan: _BlockPlan, variant: ResNetVariant) -> None:
        super().__init__()
        width = plan.planes * variant.base_width // 64 * variant.cardinality
        out_channels = plan.planes * self.expansion
        self.conv1 = nn.Conv2d(plan.in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = _conv3x3(width, width, plan.stride, plan.first_dilation, variant.cardinality)
        self.bn2 = nn.BatchNorm2d(width)
        self.act2 = nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.se = SqueezeExcite(out_channels) if variant.squeeze_excite else None
        self.act3 = nn.ReLU(inplace=True)
        self.downsample = _downsample(plan, out_channels, variant.avg_down)
        nn.init.zeros_(self.bn3.weight)

    def forward(self, features: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to ``(N, 4 * planes, H/stride, W/stride)``."""
        shortcut = features if self.downsample is None else self.downsample(features)
        output = self.act1(self.bn1(self.conv1(features)))
        output = self.act2(self.bn2(self.conv2(output)))
        output = self.bn3(self.conv3(output))
        if self.se is not None:
            output = self.se(output)
        result: Tensor = self.act3(output + shortcut)
        return result

    def receptive_field(self, field: ReceptiveField) -> ReceptiveField:
        """Return the field after this block."""
        field = _after(field, self.conv2)
        return field if self.se is None else field.everywhere()


_BLOCKS: dict[str, type[BasicBlock] | type[Bottleneck]] = {"basic": BasicBlock, "bottleneck": Bottleneck}


def _after(field: ReceptiveField, conv: nn.Conv2d) -> ReceptiveField:
    return field.conv(conv.kernel_size[0], conv.stride[0], conv.dilation[0])


def _downsample(plan: _BlockPlan, out_channels: int, avg_down: bool) -> nn.Sequential | None:
    if plan.stride == 1 and plan.in_channels == out_channels:
        return None
    if not avg_down:
        conv = nn.Conv2d(plan.in_channels, out_channels, 1, stride=plan.stride, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(out_channels))
    keeps = plan.stride == 1 and plan.dilation == 1
    pool = nn.Identity() if keeps else ShortcutPool(plan.stride)
    return nn.Sequential(pool, nn.Conv2d(plan.in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels))


def _stem_conv(in_channels: int, deep: bool) -> nn.Module:
    if not deep:
        return nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
    return nn.Sequential(
        _conv3x3(in_channels, 32, 2, 1),
        nn.BatchNorm2d(32),
        nn.ReLU(inplace=True),
        _conv3x3(32, 32, 1, 1),
        nn.BatchNorm2d(32),
        nn.ReLU(inplace=True),
        _conv3x3(32, 64, 1, 1),
    )


class ResNet(BaseBackbone):
    """Four stages of residual blocks after a stride-2 stem and a max pooling."""

    family = "resnet"
    variants: ClassVar[Mapping[str, ResNetVariant]] = VARIANTS
    output_strides = (8, 16, 32)

    def __init__(self, name: str, options: BackboneOptions) -> None:
        super().__init__(name, options)
        variant = self.variants[name]
        self.conv1 = _stem_conv(options.in_channels, variant.deep_stem)
        self.bn1 = nn.BatchNorm2d(64)
        self.act1 = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        levels, channels = self._add_stages(variant)
        self.fc = nn.Linear(channels, options.num_classes) if options.num_classes else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.finish(levels, pretrained=variant.pretrained)

    def _add_stages(self, variant: ResNetVariant) -> tuple[list[FeatureLevel], int]:
        field = ReceptiveField().conv(3, 2).conv(3).conv(3) if variant.deep_stem else ReceptiveField().conv(7, 2)
        levels = [FeatureLevel(name="stem", index=0, channels=64, stride=2, receptive_field=field.pixels)]
        field = field.conv(3, 2)
        block_type = _BLOCKS[variant.block]
        plan = DilationPlan(output_stride=self.options.output_stride, stride=4)
        channels = 64
        for index, (planes, depth) in enumerate(zip(variant.planes, variant.depths, strict=True), 1):
            first_dilation = plan.dilation
            plan, stride, dilation = plan.next(1 if index == 1 else 2)
            stage = nn.Sequential()
            for _ in range(depth):
                block = block_type(
                    _BlockPlan(
                        in_channels=channels,
                        planes=planes,
                        stride=stride,
                        dilation=dilation,
                        first_dilation=first_dilation,
                    ),
                    variant,
                )
                stage.append(block)
                field = block.receptive_field(field)
                channels, stride, first_dilation = planes * block_type.expansion, 1, dilation
            self.add_module(f"layer{index}", stage)
            levels.append(
                FeatureLevel(
                    name=f"stage{index}",
                    index=index,
                    channels=channels,
                    stride=plan.stride,
                    receptive_field=field.pixels,
                )
            )
        return levels, channels

    def _stages(self) -> tuple[nn.Sequential, ...]:
        return tuple(self.get_submodule(f"layer{index}") for index in range(1, 5))  # type: ignore[misc]

    def forward_levels(self, images: Tensor, depth: int) -> tuple[list[Tensor], Tensor]:
        """See the base: the stem before its pooling, then the four stages."""
        features = self.act1(self.bn1(self.conv1(images)))
        maps = [features]
        for index, stage in enumerate(self._stages()[: depth - 1]):
            if index == 0:
                features = self.maxpool(features)
            for block in stage:
                features = self.run_stage(block, features)
            maps.append(features)
        return maps, features

    def forward_head(self, trunk: Tensor) -> Tensor:
        """Mean over the map, then the classifier."""
        output: Tensor = self.fc(trunk.mean((2, 3)))
        return output

    def stage_modules(self) -> dict[str, tuple[nn.Module, ...]]:
        """See the base."""
        stages = {f"stage{index}": (stage,) for index, stage in enumerate(self._stages(), 1)}
        return {"stem": (self.conv1, self.bn1), **stages}
