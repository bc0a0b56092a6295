"""CoAtNet (Dai et al. 2021): two stages of inverted residuals, then two of attention with relative positions.

The ``rw`` form, with timm's names: squeeze-and-excitation before the second norm, down-sampling by
average-pooling, a bias a relative position and head over the whole map.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deploykit.backbones.attention import attend
from deploykit.backbones.base import BackboneOptions, BaseBackbone, PretrainedSource
from deploykit.backbones.features import ReceptiveField
from deploykit.backbones.graph_constants import GraphConstants
from deploykit.backbones.relative_position import pair_index, resize_table
from deploykit.errors import SpecError
from deploykit.spec import FeatureLevel, Preprocessing

_HEAD_WIDTH = 32
_STRIDES = (4, 8, 16, 32)


@dataclass(frozen=True, kw_only=True)
class CoAtNetVariant:
    """Widths of the stem's two convolutions, and width and number of blocks of each stage."""

    stem: tuple[int, int]
    widths: tuple[int, int, int, int]
    depths: tuple[int, int, int, int]
    pretrained: PretrainedSource


VARIANTS: Mapping[str, CoAtNetVariant] = {
    "coatnet_0_rw_224": CoAtNetVariant(
        stem=(32, 64),
        widths=(96, 192, 384, 768),
        depths=(2, 3, 7, 2),
        pretrained=PretrainedSource(
            tag="sw_in1k", preprocessing=Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), crop_pct=0.95)
        ),
    ),
}


class NormAct(nn.BatchNorm2d):
    """BatchNorm and SiLU, with the norm's parameters directly under its name."""

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to the same."""
        return F.silu(super().forward(input))


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of ``(N, C, H, W)``."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to the same."""
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Downsample(nn.Module):
    """2x2 average-pooling, and a 1x1 convolution where the width changes."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        same = in_channels == out_channels
        self.expand = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to ``(N, D, H/2, W/2)``."""
        output: Tensor = self.expand(F.avg_pool2d(features, 2))
        return output


class SqueezeExcite(nn.Module):
    """A gate a channel from the mean of the map (Hu et al. 2018)."""

    def __init__(self, channels: int, reduced: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, reduced, 1)
        self.fc2 = nn.Conv2d(reduced, channels, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to the same."""
        gate: Tensor = self.fc2(F.relu(self.fc1(features.mean((2, 3), keepdim=True))))
        return features * gate.sigmoid()


class ConvBlock(nn.Module):
    """A pre-norm inverted residual of expansion 4 with squeeze-and-excitation."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int) -> None:
        super().__init__()
        middle = 4 * in_channels
        self.shortcut = Downsample(in_channels, out_channels) if stride == 2 else nn.Identity()
        self.pre_norm = NormAct(in_channels)
        self.down = Downsample(in_channels, in_channels) if stride == 2 else nn.Identity()
        self.conv1_1x1 = nn.Conv2d(in_channels, middle, 1, bias=False)
        self.norm1 = NormAct(middle)
        self.conv2_kxk = nn.Conv2d(middle, middle, 3, padding=1, groups=middle, bias=False)
        self.se_early = SqueezeExcite(middle, middle // 4)
        self.norm2 = NormAct(middle)
        self.conv3_1x1 = nn.Conv2d(middle, out_channels, 1, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to ``(N, D, H/stride, W/stride)``."""
        residual = self.norm1(self.conv1_1x1(self.down(self.pre_norm(features))))
        residual = self.norm2(self.se_early(self.conv2_kxk(residual)))
        output: Tensor = self.conv3_1x1(residual) + self.shortcut(features)
        return output


class RelativePosition(nn.Module):
    """The table of biases: one row a relative position, one column a head."""

    def __init__(self, size: tuple[int, int], heads: int) -> None:
        super().__init__()
        self.size = size
        places = (2 * size[0] - 1) * (2 * size[1] - 1)
        self.relative_position_bias_table = nn.Parameter(torch.empty(places, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)


class MapAttention(GraphConstants):
    """Multi-head self-attention over all places of a map of fixed ``size``, with relative position bias."""

    index: Tensor

    def __init__(self, in_channels: int, out_channels: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.heads = in_channels // _HEAD_WIDTH
        self.qkv = nn.Conv2d(in_channels, 3 * in_channels, 1)
        self.rel_pos = RelativePosition(size, self.heads)
        self.proj = nn.Conv2d(in_channels, out_channels, 1)
        self.register_buffer("index", pair_index(size), persistent=False)
        self.keep_constants()

    def graph_constants(self) -> dict[str, Tensor]:
        """Return the bias of each head and pair of places, ``(1, heads, H*W, H*W)``."""
        area = self.rel_pos.size[0] * self.rel_pos.size[1]
        bias = self.rel_pos.relative_position_bias_table[self.index]
        return {"position_bias": bias.reshape(area, area, self.heads).permute(2, 0, 1)[None]}

    def forward(self, features: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to ``(N, D, H, W)``; timm keeps each head's query, key and value side by side."""
        height, width = self.rel_pos.size
        parts = self.qkv(features).reshape(-1, self.heads, 3 * _HEAD_WIDTH, height * width).chunk(3, dim=2)
        query, key, value = (part.transpose(2, 3) for part in parts)
        attended = attend(query, key, value, bias=self.constants()["position_bias"])
        merged = attended.transpose(2, 3).reshape(-1, self.heads * _HEAD_WIDTH, height, width)
        output: Tensor = self.proj(merged)
        return output


class ConvMlp(nn.Module):
    """An MLP of 1x1 convolutions, four times as wide inside."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, 4 * channels, 1)
        self.fc2 = nn.Conv2d(4 * channels, channels, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to the same."""
        output: Tensor = self.fc2(F.gelu(self.fc1(features)))
        return output


class AttentionBlock(nn.Module):
    """A pre-norm transformer block over a map; with a stride, the map is pooled after the norm."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.shortcut = Downsample(in_channels, out_channels) if stride == 2 else nn.Identity()
        self.norm1: nn.Module = ChannelNorm(in_channels)
        if stride == 2:
            self.norm1 = nn.Sequential()
            self.norm1.add_module("norm", ChannelNorm(in_channels))
            self.norm1.add_module("down", Downsample(in_channels, in_channels))
        self.attn = MapAttention(in_channels, out_channels, size)
        self.norm2 = ChannelNorm(out_channels)
        self.mlp = ConvMlp(out_channels)

    def forward(self, features: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to ``(N, D, H/stride, W/stride)``."""
        features = self.shortcut(features) + self.attn(self.norm1(features))
        output: Tensor = features + self.mlp(self.norm2(features))
        return output


class Stem(nn.Module):
    """Two 3x3 convolutions; the first has stride 2, the second no norm."""

    def __init__(self, in_channels: int, widths: tuple[int, int]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, stride=2, padding=1, bias=False)
        self.norm1 = NormAct(widths[0])
        self.conv2 = nn.Conv2d(widths[0], widths[1], 3, padding=1, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to ``(N, D, H/2, W/2)``."""
        output: Tensor = self.conv2(self.norm1(self.conv1(images)))
        return output


class Stage(nn.Module):
    """Blocks of one kind; the first has stride 2."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)


class Head(nn.Module):
    """The mean over the map, then a linear classifier; without classes, the mean."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, num_classes) if num_classes else nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to ``(N, num_classes)`` or ``(N, C)``."""
        output: Tensor = self.fc(features.mean((2, 3)))
        return output


class CoAtNet(BaseBackbone):
    """CoAtNet; the image size is fixed at construction, each side a multiple of 32.

    Checkpoints of another size have their position biases resampled when they are loaded.
    """

    family: ClassVar[str] = "coatnet"
    variants: ClassVar[Mapping[str, CoAtNetVariant]] = VARIANTS
    why_not_output_stride: ClassVar[str] = "its attention is tied to maps of stride 16 and 32"
    fixed_size: ClassVar[bool] = True

    def __init__(self, name: str, options: BackboneOptions) -> None:
        super().__init__(name, options)
        variant = self.variants[name]
        size = options.image_size or variant.pretrained.image_size
        if any(side % _STRIDES[-1] for side in size):
            near = tuple(max(1, round(side / 32)) * 32 for side in size)
            raise SpecError(
                f"image_size is {size}; each side must be a multiple of 32. The nearest such size is {near}."
            )
        self.stem = Stem(options.in_channels, variant.stem)
        inputs = (variant.stem[1], *variant.widths)
        self.stages = nn.Sequential(
            *(self._make_stage(variant, number, inputs[number], size) for number in range(len(variant.widths)))
        )
        self.norm = ChannelNorm(variant.widths[-1])
        self.head = Head(variant.widths[-1], options.num_classes)
        self._initialise()
        self.finish(self._levels(variant), pretrained=variant.pretrained)

    @staticmethod
    def _make_stage(variant: CoAtNetVariant, number: int, in_channels: int, image_size: tuple[int, int]) -> Stage:
        width, stride = variant.widths[number], _STRIDES[number]
        size = (image_size[0] // stride, image_size[1] // stride)
        blocks: list[nn.Module] = []
        for position in range(variant.depths[number]):
            channels, step = (in_channels, 2) if position == 0 else (width, 1)
            if number < 2:
                blocks.append(ConvBlock(channels, width, stride=step))
            else:
                blocks.append(AttentionBlock(channels, width, stride=step, size=size))
        return Stage(blocks)

    def _initialise(self) -> None:
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) or (
                isinstance(module, nn.Conv2d) and (".attn." in name or ".mlp." in name)
            ):
                nn.init.xavier_uniform_(module.weight)
            elif isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
            if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    @staticmethod
    def _levels(variant: CoAtNetVariant) -> list[FeatureLevel]:
        field = ReceptiveField().conv(3, 2).conv(3)
        stem = FeatureLevel(
            name="stem", index=0, channels=variant.stem[1], stride=field.step, receptive_field=field.pixels
        )
        whole = field.everywhere().pixels
        return [
            stem,
            *(
                FeatureLevel(name=f"stage{index}", index=index, channels=width, stride=stride, receptive_field=whole)
                for index, (width, stride) in enumerate(zip(variant.widths, _STRIDES, strict=True), 1)
            ),
        ]

    def forward_levels(self, images: Tensor, depth: int) -> tuple[list[Tensor], Tensor]:
        """See `BaseBackbone.forward_levels`; the state is the last map."""
        features = self.stem(images)
        maps = [features]
        for stage in list(self.stages)[: depth - 1]:
            for block in stage.get_submodule("blocks").children():
                features = self.run_stage(block, features)
            maps.append(features)
        return maps, features

    def forward_head(self, trunk: Tensor) -> Tensor:
        """See `BaseBackbone.forward_head`."""
        output: Tensor = self.head(self.norm(trunk))
        return output

    def stage_modules(self) -> dict[str, tuple[nn.Module, ...]]:
        """See `BaseBackbone.stage_modules`."""
        modules = [self.stem, *self.stages.children()]
        return {level.name: (module,) for level, module in zip(self.all_levels, modules, strict=True)}

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Resample the position biases of a checkpoint to the maps of this module's image size."""
        adapted = dict(state)
        for name, module in self.named_modules():
            table = state.get(f"{name}.relative_position_bias_table")
            if isinstance(module, RelativePosition) and table is not None and table.dim() == 2:
                adapted[f"{name}.relative_position_bias_table"] = resize_table(table, module.size)
        return adapted
