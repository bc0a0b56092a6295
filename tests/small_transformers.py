"""A ViT and a ConvNeXt of few blocks, for tests to which a block is as good as twelve."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

from deploykit.backbones.convnext import VARIANTS as CONVNEXTS
from deploykit.backbones.convnext import ConvNeXt, ConvNeXtVariant
from deploykit.backbones.vit import VARIANTS as VITS
from deploykit.backbones.vit import VisionTransformer, VitVariant

SHORT_VIT, SHORT_CONVNEXT = "vit_tiny_of_three_blocks", "convnext_atto_of_five_blocks"


class ShortVit(VisionTransformer):
    """ViT-Ti/16 of three blocks."""

    variants: ClassVar[Mapping[str, VitVariant]] = {SHORT_VIT: replace(VITS["vit_tiny_patch16_224"], depth=3)}


class ShortConvNeXt(ConvNeXt):
    """ConvNeXt-Atto of a block a stage, and two in the third."""

    variants: ClassVar[Mapping[str, ConvNeXtVariant]] = {
        SHORT_CONVNEXT: replace(CONVNEXTS["convnext_atto"], depths=(1, 1, 2, 1))
    }
