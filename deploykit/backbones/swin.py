"""Swin: Liu et al. 2021, "Swin Transformer"; V2: Liu et al. 2022, "Swin Transformer V2".

V2 normalises after attention and MLP, not before, attends by cosines, and makes its position bias
with an MLP. A built module takes one image size: windows, masks and position bias are made for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from deploykit.backbones.attention import Mlp
from deploykit.backbones.base import BackboneOptions, BaseBackbone, PretrainedSource
from deploykit.backbones.features import WHOLE_IMAGE
from deploykit.backbones.window_attention import CosineWindowAttention, WindowAttention, WindowGrid, crop_position_bias
from deploykit.errors import SpecError
from deploykit.spec import FeatureLevel, Preprocessing

_PATCH = 4


@dataclass(frozen=True, kw_only=True)
class SwinVariant:
    """One Swin: channels of the first stage (doubled in each next), blocks and heads of the stages.

    ``window`` is the side of a window in tokens. ``v2``: cosine attention and norms behind the branches.
    """

    width: int
    depths: tuple[int, int, int, int]
    heads: tuple[int, int, int, int]
    window: int
    v2: bool = False
    pretrained: PretrainedSource | None


def _variant(
    width: int, depth: int, window: int, side: int, tag: str, *, crop_pct: float = 0.9, v2: bool = False
) -> SwinVariant:
    """Heads of 32 channels; ``depth`` is that of the third stage, ``side`` that of the image."""
    preprocessing = Preprocessing(crop_pct=crop_pct)
    return SwinVariant(
        width=width,
        depths=(2, 2, depth, 2),
        heads=(width // 32, width // 16, width // 8, width // 4),
        window=window,
        v2=v2,
        pretrained=PretrainedSource(tag=tag, preprocessing=preprocessing, image_size=(side, side)),
    )


# fmt: off
VARIANTS: dict[str, SwinVariant] = {
    "swin_tiny_patch4_window7_224": _variant(96, 6, 7, 224, "ms_in1k"),
    "swin_small_patch4_window7_224": _variant(96, 18, 7, 224, "ms_in22k_ft_in1k"),
    "swin_base_patch4_window7_224": _variant(128, 18, 7, 224, "ms_in22k_ft_in1k"),
    "swin_base_patch4_window12_384": _variant(128, 18, 12, 384, "ms_in22k_ft_in1k", crop_pct=1.0),
    "swinv2_tiny_window8_256": _variant(96, 6, 8, 256, "ms_in1k", v2=True),
    "swinv2_small_window8_256": _variant(96, 18, 8, 256, "ms_in1k", v2=True),
    "swinv2_tiny_window16_256": _variant(96, 6, 16, 256, "ms_in1k", v2=True),
    "swinv2_small_window16_256": _variant(96, 18, 16, 256, "ms_in1k", v2=True),
}
# fmt: on


class PatchEmbed(nn.Module):
    """Non-overlapping 4x4 patches to normed tokens."""

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, _PATCH, stride=_PATCH)
        self.norm = nn.LayerNorm(width)

    def forward(self, images: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to ``(N, H // 4, W // 4, width)``."""
        tokens: Tensor = self.norm(self.proj(images).permute(0, 2, 3, 1))
        return tokens


class PatchMerging(nn.Module):
    """Joins 2x2 tokens and halves their channels; an odd side is padded with zeros.

    Args:
        dim: channels before merging; twice as many leave.
        size: (height, width) of the map before merging, in tokens.
        norm_last: V2, which norms what leaves and not what is joined.
    """

    def __init__(self, dim: int, size: tuple[int, int], *, norm_last: bool) -> None:
        super().__init__()
        self.dim, self.size, self.norm_last = dim, size, norm_last
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(2 * dim if norm_last else 4 * dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map ``(N, H, W, dim)`` to ``(N, ceil(H / 2), ceil(W / 2), 2 * dim)``."""
        height, width = self.size
        if height % 2 or width % 2:
            tokens = F.pad(tokens, (0, 0, 0, width % 2, 0, height % 2))
        high, wide = _halved(self.size)
        pairs = tokens.reshape(-1, 2, wide, 2, self.dim).permute(0, 2, 3, 1, 4)
        joined = pairs.reshape(-1, high, wide, 4 * self.dim)
        merged: Tensor = self.norm(self.reduction(joined)) if self.norm_last else self.reduction(self.norm(joined))
        return merged


class Block(nn.Module):
    """Window attention and an MLP, each with a residual, on ``(N, H, W, dim)``.

    Args:
        dim: channels of a token.
        heads: attention heads.
        grid: the windows; H and W are its size.
        v2: cosine attention, and norms behind attention and MLP.
    """

    def __init__(self, dim: int, heads: int, grid: WindowGrid, *, v2: bool) -> None:
        super().__init__()
        self.v2 = v2
        self.norm1 = nn.LayerNorm(dim)
        self.attn = CosineWindowAttention(dim, heads, grid) if v2 else WindowAttention(dim, heads, grid)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map ``(N, H, W, dim)`` to the same shape."""
        if self.v2:
            tokens = tokens + self.norm1(self.attn(tokens))
            tokens = tokens + self.norm2(self.mlp(tokens))
        else:
            tokens = tokens + self.attn(self.norm1(tokens))
            tokens = tokens + self.mlp(self.norm2(tokens))
        return tokens


class Stage(nn.Module):
    """Merging, from the second stage on, and blocks with plain and shifted windows in turn."""

    def __init__(self, variant: SwinVariant, index: int, size: tuple[int, int]) -> None:
        super().__init__()
        dim = variant.width * 2**index
        self.downsample: nn.Module = nn.Identity()
        if index:
            self.downsample = PatchMerging(dim // 2, size, norm_last=variant.v2)
            size = _halved(size)
        self.grids = [
            WindowGrid.fit(size, variant.window, shifted=block % 2 == 1) for block in range(variant.depths[index])
        ]
        self.blocks = nn.Sequential(*(Block(dim, variant.heads[index], grid, v2=variant.v2) for grid in self.grids))


class Head(nn.Module):
    """Global mean and the classifier."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(dim, num_classes) if num_classes else nn.Identity()

    def forward(self, tokens: Tensor) -> Tensor:
        """Map ``(N, H, W, dim)`` to ``(N, num_classes)``, or ``(N, dim)`` when there are no classes."""
        logits: Tensor = self.fc(tokens.mean((1, 2)))
        return logits


class Swin(BaseBackbone):
    """Swin V1 and V2, with levels ``stage1`` to ``stage4`` (strides 4 to 32) and none of stride 2.

    Any image size from 4x4 on: windows shrink to maps that are smaller than one, other maps are padded
    to whole windows. There is no stochastic depth: a training recipe that wants it wraps the blocks.
    """

    family: ClassVar[str] = "swin"
    variants: ClassVar[Mapping[str, SwinVariant]] = VARIANTS
    why_not_output_stride: ClassVar[str] = "its windows are cut from maps of strides 4 to 32"
    fixed_size: ClassVar[bool] = True

    def __init__(self, name: str, options: BackboneOptions) -> None:
        super().__init__(name, options)
        variant = self.variants[name]
        image_size = options.image_size or (variant.pretrained.image_size if variant.pretrained else (224, 224))
        if min(image_size) < _PATCH:
            raise SpecError(f"image_size is {image_size}; {name} needs at least {_PATCH} pixels a side.")
        self.patch_embed = PatchEmbed(options.in_channels, variant.width)
        size = (image_size[0] // _PATCH, image_size[1] // _PATCH)
        stages = []
        for index in range(len(variant.depths)):
            stages.append(Stage(variant, index, size))
            size = stages[-1].grids[0].size
        self.layers = nn.Sequential(*stages)
        dim = variant.width * 2 ** (len(stages) - 1)
        self.norm = nn.LayerNorm(dim)
        self.head = Head(dim, options.num_classes)
        self.apply(_init_weights)
        fields = _receptive_fields(image_size, stages)
        levels = [
            FeatureLevel(
                name=f"stage{index + 1}",
                index=index + 1,
                channels=variant.width * 2**index,
                stride=_PATCH * 2**index,
                receptive_field=field,
            )
            for index, field in enumerate(fields)
        ]
        self.finish(levels, pretrained=variant.pretrained)

    def forward_levels(self, images: Tensor, depth: int) -> tuple[list[Tensor], Tensor]:
        """See `BaseBackbone.forward_levels`; the state is the last map as ``(N, H, W, C)``."""
        maps: list[Tensor] = []
        tokens: Tensor = self.patch_embed(images)
        for stage in list(self.layers)[:depth]:
            tokens = self.run_stage(stage.get_submodule("downsample"), tokens)
            for block in stage.get_submodule("blocks").children():
                tokens = self.run_stage(block, tokens)
            maps.append(tokens.permute(0, 3, 1, 2))
        return maps, tokens

    def forward_head(self, trunk: Tensor) -> Tensor:
        """Map ``(N, H/32, W/32, C)`` to ``(N, num_classes)`` logits, or the ``(N, C)`` mean of normed tokens."""
        output: Tensor = self.head(self.norm(trunk))
        return output

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Cut V1's tables of position bias down to windows that a small map has shrunk.

        Each relative position keeps its bias, so that tokens attend as in the corner of a larger map.
        """
        adapted = dict(state)
        for name, module in self.named_modules():
            key = f"{name}.relative_position_bias_table"
            if isinstance(module, WindowAttention) and key in state:
                adapted[key] = crop_position_bias(state[key], module.grid.window)
        return adapted

    def stage_modules(self) -> dict[str, tuple[nn.Module, ...]]:
        """Return the four stages; the patch embedding belongs to the first."""
        first, *others = self.layers
        return {"stage1": (self.patch_embed, first), **{f"stage{i}": (stage,) for i, stage in enumerate(others, 2)}}


def _halved(size: tuple[int, int]) -> tuple[int, int]:
    return ((size[0] + 1) // 2, (size[1] + 1) // 2)


def _receptive_fields(image_size: tuple[int, int], stages: list[Stage]) -> list[int]:
    """Return the widest interval of pixels that a token of each stage sees on either axis, or `WHOLE_IMAGE`.

    Windows do not slide, so what tokens see differs from one to the next: each is followed through
    the windows of all blocks. The whole image is one that every token sees.
    """
    axes = [[(start, start + _PATCH) for start in range(0, side - _PATCH + 1, _PATCH)] for side in image_size]
    whole = [(axis[0][0], axis[-1][1]) for axis in axes]
    fields = []
    for index, stage in enumerate(stages):
        if index:
            axes = [_merged(axis) for axis in axes]
        for grid in stage.grids:
            axes = [grid.spread(seen, axis) for axis, seen in enumerate(axes)]
        everywhere = all(set(seen) == {extent} for seen, extent in zip(axes, whole, strict=True))
        fields.append(WHOLE_IMAGE if everywhere else max(high - low for seen in axes for low, high in seen))
    return fields


def _merged(seen: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return what pairs of neighbours see together; the last token of an odd axis has no neighbour."""
    pairs = [seen[start : start + 2] for start in range(0, len(seen), 2)]
    return [(min(low for low, _ in pair), max(high for _, high in pair)) for pair in pairs]


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, Block) and module.v2:
        # Each block starts as the identity (Liu et al. 2022, section 3.2).
        for norm in (module.norm1, module.norm2):
            nn.init.zeros_(norm.weight)
