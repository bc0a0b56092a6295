"""Narrow variants of the families, whose smallest have more weights than minutes on a processor train."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

from deploykit.backbones.coatnet import VARIANTS as COATNETS
from deploykit.backbones.coatnet import CoAtNet, CoAtNetVariant
from deploykit.backbones.convnext import VARIANTS as CONVNEXTS
from deploykit.backbones.convnext import ConvNeXt, ConvNeXtVariant
from deploykit.backbones.efficient import EfficientNet, EfficientNetVariant
from deploykit.backbones.hybrid import VARIANTS as HYBRIDS
from deploykit.backbones.hybrid import HybridVariant, HybridViT
from deploykit.backbones.mobilevit import VARIANTS as MOBILEVITS
from deploykit.backbones.mobilevit import MobileViT, MobileVitVariant
from deploykit.backbones.registry import is_known, register_backbone
from deploykit.backbones.resnet import ResNet, ResNetVariant
from deploykit.backbones.resnetv2 import ResNetV2, ResNetV2Variant
from deploykit.backbones.swin import VARIANTS as SWINS
from deploykit.backbones.swin import Swin, SwinVariant
from deploykit.backbones.vit import VARIANTS as VITS
from deploykit.backbones.vit import VisionTransformer, VitVariant


class NarrowResNet(ResNet):
    """One basic block a stage, half of the width of ResNet-18."""

    variants: ClassVar[Mapping[str, ResNetVariant]] = {
        "resnet_narrow": ResNetVariant(block="basic", depths=(1, 1, 1, 1), planes=(32, 64, 128, 256))
    }


class NarrowResNetV2(ResNetV2):
    """One block a stage, a quarter of the width."""

    variants: ClassVar[Mapping[str, ResNetV2Variant]] = {
        "resnetv2_narrow": ResNetV2Variant(depths=(1, 1, 1, 1), channels=(64, 128, 256, 512))
    }


class NarrowEfficientNet(EfficientNet):
    """A third of the width of B0, half of the blocks."""

    variants: ClassVar[Mapping[str, EfficientNetVariant]] = {
        "efficientnet_narrow": EfficientNetVariant(width=0.35, depth=0.5)
    }


class NarrowConvNeXt(ConvNeXt):
    """Five blocks, half of the width of ConvNeXt-Atto."""

    variants: ClassVar[Mapping[str, ConvNeXtVariant]] = {
        "convnext_narrow": replace(CONVNEXTS["convnext_atto"], depths=(1, 1, 2, 1), widths=(24, 48, 96, 192))
    }


class NarrowMobileViT(MobileViT):
    """Half of the width, half of the transformers."""

    variants: ClassVar[Mapping[str, MobileVitVariant]] = {
        "mobilevit_narrow": replace(
            MOBILEVITS["mobilevit_s"],
            widths=(16, 32, 48, 64, 80),
            blocks=(1, 2, 1, 1, 1),
            dims=(64, 80, 96),
            depths=(1, 2, 1),
            head_width=320,
        )
    }


class NarrowViT(VisionTransformer):
    """Half of the width of ViT-Ti, a third of its blocks."""

    variants: ClassVar[Mapping[str, VitVariant]] = {
        "vit_narrow": replace(VITS["vit_tiny_patch16_224"], dim=96, depth=4, patch=4)
    }


class NarrowHybrid(HybridViT):
    """Four blocks of 128 channels on a ResNet of one block a stage."""

    variants: ClassVar[Mapping[str, HybridVariant]] = {
        "hybrid_narrow": replace(HYBRIDS["vit_base_r50_s16_224"], dim=128, depth=4, heads=4, layers=(1, 1, 1))
    }


class NarrowCoAtNet(CoAtNet):
    """A third of the width, half the blocks."""

    variants: ClassVar[Mapping[str, CoAtNetVariant]] = {
        "coatnet_narrow": replace(
            COATNETS["coatnet_0_rw_224"], stem=(16, 32), widths=(32, 64, 128, 256), depths=(1, 2, 3, 1)
        )
    }


class NarrowSwin(Swin):
    """A third of the width, two blocks a stage, windows of four tokens a side."""

    variants: ClassVar[Mapping[str, SwinVariant]] = {
        "swin_narrow": replace(
            SWINS["swin_tiny_patch4_window7_224"], width=32, depths=(2, 2, 2, 2), heads=(1, 2, 4, 8), window=4
        )
    }


FAMILIES = (
    NarrowResNet,
    NarrowResNetV2,
    NarrowEfficientNet,
    NarrowConvNeXt,
    NarrowMobileViT,
    NarrowViT,
    NarrowHybrid,
    NarrowCoAtNet,
    NarrowSwin,
)


def register() -> None:
    """Let every network of this file be built by its name."""
    for family in FAMILIES:
        if not all(is_known(name) for name in family.variants):
            register_backbone(family)
