"""Join a backbone and a feature pyramid (Lin et al. 2017), and run both as one engine.

Example: python examples/feature_pyramid.py --backbone mobilenetv3_small_100 --image-size 256
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np

from deploykit import FeaturePyramid, WithNeck, create_backbone


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the shape of every level, and how far the engine is from torch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="resnet18", help="default: %(default)s")
    parser.add_argument("--image-size", type=int, default=224, help="pixels (default: %(default)s)")
    parser.add_argument("--channels", type=int, default=128, help="of each level (default: %(default)s)")
    parser.add_argument("--runtime", default="onnxruntime", help="default: %(default)s")
    options = parser.parse_args(arguments)

    backbone = create_backbone(
        options.backbone, features_only=True, output_indices=(2, 3, 4), image_size=options.image_size
    )
    detector = WithNeck(backbone, FeaturePyramid(backbone.feature_info, channels=options.channels))
    side = options.image_size
    images = np.random.default_rng(0).standard_normal((1, 3, side, side)).astype(np.float32)
    expected = detector(images)
    with create_backbone(detector, runtime=options.runtime, cache=False) as engine:
        found = engine(images)
        for level in engine.feature_info:
            worst = float(np.abs(found[level.name] - expected[level.name]).max())
            print(f"{level.name}: stride {level.stride}, {found[level.name].shape}, max-abs against torch {worst:.1e}")


if __name__ == "__main__":
    main()
