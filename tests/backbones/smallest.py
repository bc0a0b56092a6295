"""The smallest network of each family, and of each kind of MobileNet and EfficientNet."""

from __future__ import annotations

SMALLEST = (
    "resnet18",
    "resnetv2_50",
    "efficientnet_b0",
    "tf_efficientnet_lite0",
    "mobilenetv2_050",
    "mobilenetv3_small_075",
    "mobilenetv4_conv_small",
    "regnety_002",
    "vit_tiny_patch16_224",
    "vit_small_r26_s32_224",
    "swin_tiny_patch4_window7_224",
    "convnext_atto",
    "coatnet_0_rw_224",
    "mobilevit_s",
)
