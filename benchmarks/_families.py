"""One small network of each family with realistic random weights, and smooth images, for benchmarks of parity."""

from __future__ import annotations

import numpy as np
import torch
from _from_tests import realistic

from deploykit import create_backbone
from deploykit.arrays import FloatArray
from deploykit.backbones.base import BaseBackbone
from deploykit.backbones.necks import FeaturePyramid, WithNeck

FAMILIES = {
    "resnet18": 64,
    "resnetv2_50": 64,
    "efficientnet_b0": 64,
    "regnety_002": 64,
    "mobilenetv3_small_075": 64,
    "vit_tiny_patch16_224": 64,
    "vit_small_r26_s32_224": 64,
    "mobilevit_s": 64,
    "coatnet_0_rw_224": 64,
    "convnext_atto": 64,
    "swin_tiny_patch4_window7_224": 56,
}
"""One network of each family, and its image side in pixels."""

WITHOUT_PYRAMID = ("vit_tiny_patch16_224", "vit_small_r26_s32_224")
"""Plain ViTs, whose levels are all of one stride; the hybrid cannot make others."""


def classifier(name: str, seed: int = 0) -> BaseBackbone:
    """A family's network with its head."""
    torch.manual_seed(seed)
    return realistic(create_backbone(name, image_size=FAMILIES[name]), seed).eval()


def with_pyramid(name: str, seed: int = 0) -> BaseBackbone:
    """A family's network with a feature pyramid behind it, whose outputs are several maps and which resizes."""
    torch.manual_seed(seed)
    options = {"hierarchical": True} if name == "vit_tiny_patch16_224" else {}
    backbone = create_backbone(name, image_size=FAMILIES[name], features_only=True, **options)
    backbone = realistic(backbone, seed).eval()
    if name in WITHOUT_PYRAMID and not options:
        return backbone
    return WithNeck(backbone, FeaturePyramid(backbone.feature_info, 16)).eval()


def smooth_images(side: int, count: int = 16, seed: int = 0) -> FloatArray:
    """Random images ``(count, 3, side, side)`` of neighbouring pixels alike, as photographs are."""
    noise = np.random.default_rng(seed).standard_normal((count, 3, side // 4, side // 4)).astype(np.float32)
    resized = torch.nn.functional.interpolate(torch.from_numpy(noise), size=side, mode="bilinear")
    return np.ascontiguousarray(resized.numpy())
