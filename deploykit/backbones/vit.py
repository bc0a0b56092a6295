"""Plain vision transformers: ViT, DeiT, DeiT-III and DINOv2, with and without registers.

A level is a block: index and name are the block's number, and all have the stride of the patch. The
maps are the blocks' outputs before the final norm, without class token and registers, as timm's
``features_only`` gives them; by default those of the last three blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deploykit.backbones.attention import TransformerBlock
from deploykit.backbones.base import BackboneOptions, BaseBackbone, PretrainedSource
from deploykit.backbones.features import WHOLE_IMAGE
from deploykit.backbones.graph_constants import GraphConstants
from deploykit.backbones.patch_embedding import (
    PatchEmbed,
    resample_patch_weight,
    resample_position_embedding,
    source_grid,
)
from deploykit.backbones.vit_pyramid import (
    PYRAMID_STRIDES,
    SIMPLE_FEATURE_PYRAMID,
    ResamplePyramid,
    SimpleFeaturePyramid,
)
from deploykit.spec import FeatureLevel, Preprocessing


@dataclass(frozen=True, kw_only=True)
class VitVariant:
    """A plain ViT: ``patch`` in pixels, ``dim`` channels a token, ``depth`` blocks of ``heads`` heads.

    ``prefix_has_position`` says whether the class token has a position embedding of its own.
    """

    dim: int
    depth: int
    heads: int
    patch: int
    pretrained: PretrainedSource
    layer_scale: float | None = None
    registers: int = 0
    prefix_has_position: bool = True


_HALF = Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), crop_pct=0.9)
_IMAGENET = Preprocessing(crop_pct=0.9)
_SIZES: Mapping[str, tuple[int, int, int]] = {
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
}


def _vit(size: str, patch: int, tag: str) -> VitVariant:
    dim, depth, heads = _SIZES[size]
    return VitVariant(
        dim=dim, depth=depth, heads=heads, patch=patch, pretrained=PretrainedSource(tag=tag, preprocessing=_HALF)
    )


def _deit(size: str) -> VitVariant:
    source = PretrainedSource(tag="fb_in1k", preprocessing=_IMAGENET)
    return replace(_vit(size, 16, ""), pretrained=source)


def _deit3(size: str) -> VitVariant:
    return replace(_deit(size), layer_scale=1e-6, prefix_has_position=False)


def _dinov2(size: str, registers: int = 0) -> VitVariant:
    source = PretrainedSource(
        tag="lvd142m",
        preprocessing=Preprocessing(crop_pct=1.0),
        image_size=(518, 518),
        num_classes=0,
        label_set=None,
    )
    return replace(
        _vit(size, 14, ""),
        pretrained=source,
        layer_scale=1e-5,
        registers=registers,
        prefix_has_position=registers == 0,
    )


VARIANTS: Mapping[str, VitVariant] = {
    "vit_tiny_patch16_224": _vit("tiny", 16, "augreg_in21k_ft_in1k"),
    "vit_small_patch16_224": _vit("small", 16, "augreg_in21k_ft_in1k"),
    "vit_base_patch16_224": _vit("base", 16, "augreg2_in21k_ft_in1k"),
    "vit_large_patch16_224": _vit("large", 16, "augreg_in21k_ft_in1k"),
    "vit_small_patch32_224": _vit("small", 32, "augreg_in21k_ft_in1k"),
    "vit_base_patch32_224": _vit("base", 32, "augreg_in21k_ft_in1k"),
    "vit_large_patch32_224": replace(
        _vit("large", 32, ""),
        pretrained=PretrainedSource(tag="orig_in21k", preprocessing=_HALF, num_classes=0, label_set=None),
    ),
    "deit_tiny_patch16_224": _deit("tiny"),
    "deit_small_patch16_224": _deit("small"),
    "deit_base_patch16_224": _deit("base"),
    "deit3_small_patch16_224": _deit3("small"),
    "deit3_base_patch16_224": _deit3("base"),
    "deit3_large_patch16_224": _deit3("large"),
    "vit_small_patch14_dinov2": _dinov2("small"),
    "vit_base_patch14_dinov2": _dinov2("base"),
    "vit_large_patch14_dinov2": _dinov2("large"),
    "vit_small_patch14_reg4_dinov2": _dinov2("small", 4),
    "vit_base_patch14_reg4_dinov2": _dinov2("base", 4),
    "vit_large_patch14_reg4_dinov2": _dinov2("large", 4),
}


class VisionTransformer(GraphConstants, BaseBackbone):
    """A plain ViT (Dosovitskiy et al. 2021), pooled by its class token.

    ``image_size`` and ``patch_size`` are fixed at construction; checkpoints of another size are
    resampled when they are loaded. ``hierarchical=True`` makes levels 1 to 4 of stride 4, 8, 16 and
    32 out of four evenly spaced blocks (`ResamplePyramid`),
    ``hierarchical="simple_feature_pyramid"`` by ViTDet's module (`SimpleFeaturePyramid`).
    """

    family: ClassVar[str] = "vit"
    variants: ClassVar[Mapping[str, VitVariant]] = VARIANTS
    why_not_output_stride: ClassVar[str] = "all its levels have the stride of its patch (see patch_size=)"
    fixed_size: ClassVar[bool] = True
    takes_patch_size: ClassVar[bool] = True
    untrained_prefixes: ClassVar[tuple[str, ...]] = ("pyramid.",)

    def __init__(self, name: str, options: BackboneOptions) -> None:
        variant = self.variants[name]
        if options.output_indices is None and not options.hierarchical:
            options = replace(options, output_indices=tuple(range(variant.depth - 3, variant.depth)))
        super().__init__(name, options)
        self.variant = variant
        self.prefix = 1 + variant.registers
        self.patch_embed = self._make_patch_embed(options.image_size or variant.pretrained.image_size)
        places = self.patch_embed.grid[0] * self.patch_embed.grid[1]
        embedded = places + self.prefix if variant.prefix_has_position else places
        self.cls_token = nn.Parameter(torch.zeros(1, 1, variant.dim))
        self.reg_token = nn.Parameter(torch.zeros(1, variant.registers, variant.dim)) if variant.registers else None
        self.pos_embed = nn.Parameter(torch.zeros(1, embedded, variant.dim))
        self.blocks = nn.Sequential(
            *(
                TransformerBlock(variant.dim, variant.heads, layer_scale=variant.layer_scale)
                for _ in range(variant.depth)
            )
        )
        self.norm = nn.LayerNorm(variant.dim, eps=1e-6)
        self.head = nn.Linear(variant.dim, options.num_classes) if options.num_classes else nn.Identity()
        self.pyramid = self._make_pyramid()
        self._initialise()
        self.keep_constants()
        self.finish(self._levels(), pretrained=variant.pretrained)

    def _make_patch_embed(self, image_size: tuple[int, int]) -> PatchEmbed:
        patch = self.options.patch_size or self.variant.patch
        return PatchEmbed(image_size, patch, self.options.in_channels, self.variant.dim)

    def _make_pyramid(self) -> ResamplePyramid | SimpleFeaturePyramid | None:
        if not self.options.hierarchical:
            return None
        if self.options.hierarchical == SIMPLE_FEATURE_PYRAMID:
            return SimpleFeaturePyramid(self.variant.dim, self.patch_embed.stride)
        return ResamplePyramid(self.variant.dim, self.patch_embed.stride)

    def _initialise(self) -> None:
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        if self.reg_token is not None:
            nn.init.normal_(self.reg_token, std=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def _levels(self) -> list[FeatureLevel]:
        if self.pyramid is not None:
            return [
                FeatureLevel(
                    name=f"stage{index}",
                    index=index,
                    channels=self.pyramid.channels,
                    stride=stride,
                    receptive_field=WHOLE_IMAGE,
                )
                for index, stride in enumerate(PYRAMID_STRIDES, 1)
            ]
        stride = self.patch_embed.stride
        return [
            FeatureLevel(
                name=f"block{index}",
                index=index,
                channels=self.variant.dim,
                stride=stride,
                receptive_field=WHOLE_IMAGE,
            )
            for index in range(self.variant.depth)
        ]

    def _sources(self) -> list[int]:
        """Return the block from which each of ``all_levels`` comes."""
        depth = self.variant.depth
        if self.pyramid is None:
            return list(range(depth))
        if isinstance(self.pyramid, SimpleFeaturePyramid):
            return [depth - 1] * len(PYRAMID_STRIDES)
        return [depth * count // 4 - 1 for count in (1, 2, 3, 4)]

    def forward_levels(self, images: Tensor, depth: int) -> tuple[list[Tensor], Tensor]:
        """See `BaseBackbone.forward_levels`; the state is ``(N, prefix + T, dim)``."""
        sources = self._sources()[:depth]
        tokens = self._embed(images)
        maps: dict[int, Tensor] = {}
        for number, block in enumerate(list(self.blocks)[: sources[-1] + 1]):
            tokens = self.run_stage(block, tokens)
            if number in sources:
                maps[number] = self._to_map(tokens)
        return self._to_levels(maps, depth), tokens

    def forward_head(self, trunk: Tensor) -> Tensor:
        """See `BaseBackbone.forward_head`; the embedding is the normalised class token."""
        output: Tensor = self.head(self.norm(trunk[:, 0]))
        return output

    def stage_modules(self) -> dict[str, tuple[nn.Module, ...]]:
        """See `BaseBackbone.stage_modules`; the first level has the patch embedding too."""
        modules: dict[str, tuple[nn.Module, ...]] = {}
        blocks, done = list(self.blocks), 0
        for position, (level, source) in enumerate(zip(self.all_levels, self._sources(), strict=True)):
            first = (self.patch_embed,) if position == 0 else ()
            own = (self.pyramid.levels[position],) if isinstance(self.pyramid, SimpleFeaturePyramid) else ()
            modules[level.name] = (*first, *blocks[done : source + 1], *own)
            done = source + 1
        return modules

    def freeze(self, up_to: str | None) -> None:
        """As `BaseBackbone.freeze`; the class token, registers and position embeddings go with the first level."""
        super().freeze(up_to)
        for parameter in (self.cls_token, self.reg_token, self.pos_embed):
            if parameter is not None:
                parameter.requires_grad_(up_to is None)

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Resample the patch weights and the position embeddings of a checkpoint to this module's sizes.

        A pyramid, which timm's checkpoint of the variant lacks, keeps its fresh parameters.
        """
        adapted = {**self._absent(state, "pyramid."), **state}
        weight, positions = state.get("patch_embed.proj.weight"), state.get("pos_embed")
        if weight is None or weight.dim() != 4:
            return adapted
        kernel = self.patch_embed.proj.kernel_size
        adapted["patch_embed.proj.weight"] = resample_patch_weight(weight, (kernel[0], kernel[1]))
        if positions is not None and positions.dim() == 3:
            prefix = self.prefix if self.variant.prefix_has_position else 0
            target = self.patch_embed.grid
            source = source_grid(positions.shape[1] - prefix, native=self._native_grid(weight), target=target)
            if source is not None:
                adapted["pos_embed"] = resample_position_embedding(positions, source, target, prefix=prefix)
        return adapted

    def _absent(self, state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
        """This module's own tensors under a prefix of which the checkpoint has none."""
        if any(name.startswith(prefix) for name in state):
            return {}
        return {name: value for name, value in self.state_dict().items() if name.startswith(prefix)}

    def image_size_in(self, state: Mapping[str, Tensor]) -> tuple[int, int] | None:
        """See `BaseBackbone.image_size_in`: the side of a square grid of position embeddings, in pixels."""
        weight, positions = state.get("patch_embed.proj.weight"), state.get("pos_embed")
        if weight is None or positions is None or weight.dim() != 4 or positions.dim() != 3:
            return None
        tokens = positions.shape[1] - (self.prefix if self.variant.prefix_has_position else 0)
        native = self._native_grid(weight)
        grid = source_grid(tokens, native=native, target=native) if tokens > 0 else None
        if grid is None or grid == native:
            return None
        scale = self.patch_embed.stride / self.patch_embed.proj.kernel_size[0]
        return round(grid[0] * weight.shape[2] * scale), round(grid[1] * weight.shape[3] * scale)

    def _native_grid(self, patch_weight: Tensor) -> tuple[int, int]:
        """Return the grid on which the variant was trained, with patches as in the checkpoint."""
        height, width = self.variant.pretrained.image_size
        return height // patch_weight.shape[2], width // patch_weight.shape[3]

    def _embed(self, images: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to ``(N, prefix + T, dim)`` tokens with their positions added."""
        # Padding instead of joining an expanded class token: the graph needs no batch size.
        return F.pad(self.patch_embed(images), (0, 0, self.prefix, 0)) + self.constants()["places"]

    def graph_constants(self) -> dict[str, Tensor]:
        """Return the position embeddings with the class token and the registers, ``(1, prefix + T, dim)``."""
        prefix: Tensor = self.cls_token
        if self.reg_token is not None:
            prefix = torch.cat([prefix, self.reg_token], dim=1)
        positions: Tensor = self.pos_embed
        if self.variant.prefix_has_position:
            places = positions.shape[1] - self.prefix
            return {"places": F.pad(prefix, (0, 0, 0, places)) + positions}
        return {"places": torch.cat([prefix, positions], dim=1)}

    def _to_levels(self, maps: Mapping[int, Tensor], depth: int) -> list[Tensor]:
        """Return the first ``depth`` levels, from the maps of the blocks that they come from."""
        ordered = [maps[number] for number in sorted(maps)]
        if self.pyramid is None:
            return ordered
        return [self.pyramid(position, ordered) for position in range(depth)]

    def _to_map(self, tokens: Tensor) -> Tensor:
        """Map ``(N, prefix + T, dim)`` to ``(N, dim, H/patch, W/patch)``."""
        height, width = self.patch_embed.grid
        return tokens[:, self.prefix :].transpose(1, 2).reshape(-1, self.variant.dim, height, width)
