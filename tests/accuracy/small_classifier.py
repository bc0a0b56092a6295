"""A classifier of six classes that an export takes a second for, and images on which it names all of them."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

import deploykit
from deploykit.spec import Preprocessing

CLASSES, SIDE, IMAGES = 6, 32, 60
NAMES = ["ant", "bee", "cat", "dog", "emu", "fox"]


def pixels() -> np.ndarray:
    """Smooth random pictures, ``(N, H, W, 3)`` uint8, each with a colour of its own."""
    generator = np.random.default_rng(0)
    colours = generator.uniform(0, 255, (IMAGES, 1, 1, 3))
    coarse = generator.normal(0, 60, (IMAGES, 4, 4, 3)).repeat(SIDE // 4, 1).repeat(SIDE // 4, 2)
    return (colours + coarse).clip(0, 255).astype(np.uint8)


class OneLevel(nn.Module):
    """A body that gives one level of features."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*layers)

    def forward(self, images):
        """Images to one map by name."""
        return {"deep": self.body(images)}


def small_classifier(classes: int = CLASSES):
    """A module, its classes about as likely as each other on `pixels`, without classes one level; and its options."""
    torch.manual_seed(1)
    body = [nn.Conv2d(3, 16, 3, 2), nn.ReLU(), nn.Conv2d(16, 32, 3, 2), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, max(1, classes))]
    module = nn.Sequential(*body, *head).eval() if classes else OneLevel(*body).eval()
    how = Preprocessing(crop_pct=1.0)
    if classes:
        spec = deploykit.InputSpec(height=SIDE, width=SIDE, preprocessing=how)
        images = torch.from_numpy(deploykit.preprocess(list(pixels()), spec))
        with torch.no_grad():
            logits = module(images)
            module[-1].weight /= logits.std(0, keepdim=True).T
            module[-1].bias.copy_(module[-1].bias - module(images).mean(0))
    return module, {"image_size": SIDE, "preprocessing": how}


def export(folder, classes: int = CLASSES, **options):
    """The bundle of the module in ONNX Runtime."""
    module, shape = small_classifier(classes)
    deploykit.export_backbone(module, folder, runtime="onnxruntime", batch_size="dynamic", **shape, **options)
    return folder
