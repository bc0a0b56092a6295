"""A small convolutional backbone of this repository's own kind, which takes any image size and exports in a second."""

from __future__ import annotations

import torch
from torch import nn

from deploykit.backbones.base import BackboneOptions, BaseBackbone
from deploykit.spec import FeatureLevel


class AnySize(BaseBackbone):
    """Two levels of strides 2 and 4, an upsampling between them, and a head of five classes."""

    family = "any_size"

    def __init__(self, **options) -> None:
        super().__init__("any_size", BackboneOptions(num_classes=5, image_size=(24, 32), **options))
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.stage1 = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU())
        self.head = nn.Linear(16, 5)
        self.finish(
            [
                FeatureLevel(name="stem", index=0, channels=8, stride=2, receptive_field=3),
                FeatureLevel(name="stage1", index=1, channels=16, stride=4, receptive_field=7),
            ],
            pretrained=None,
        )
        self.eval()

    def forward_levels(self, images, depth):
        """See `BaseBackbone.forward_levels`."""
        stem = self.stem(images)
        maps = [stem, self.stage1(stem)]
        return maps[:depth], maps[-1]

    def forward_head(self, trunk):
        """See `BaseBackbone.forward_head`."""
        return self.head(trunk.mean((2, 3)))

    def stage_modules(self):
        """See `BaseBackbone.stage_modules`."""
        return {"stem": (self.stem,), "stage1": (self.stage1,)}
