"""Export a module of your own: a dict of maps becomes levels, and everything else is as for a named backbone.

Example: python examples/custom_module.py --output own-bundle
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from deploykit import export_backbone, load_bundle


class TwoScales(nn.Module):
    """``(N, 3, H, W)`` to two feature maps, of strides 4 and 8."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Sequential(nn.Conv2d(3, 16, 4, stride=4), nn.BatchNorm2d(16), nn.ReLU())
        self.coarse = nn.Sequential(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU())

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the maps by the names that the engine's levels get."""
        fine = self.fine(images)
        return {"fine": fine, "coarse": self.coarse(fine)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Export, open the bundle, and run it on the same images as the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runtime", default="onnxruntime", help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("own-bundle"), help="default: %(default)s")
    options = parser.parse_args(arguments)

    module = TwoScales().eval()
    result = export_backbone(module, options.output, runtime=options.runtime, image_size=64)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad(), load_bundle(options.output) as engine:
        expected, found = module(images), engine(images)
        for level in engine.feature_info:
            worst = (found[level.name] - expected[level.name]).abs().max().item()
            print(f"{level.name}: stride {level.stride}, {level.channels} channels, max-abs against torch {worst:.1e}")
    print(f"{options.output}: {result.status}, BatchNorms folded: {result.manifest.fusions['fold-batchnorm']}")


if __name__ == "__main__":
    main()
