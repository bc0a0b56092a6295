"""Open a classifier's bundle and print the best classes of images. Needs its runtime, NumPy and Pillow, and no torch.

Example: python examples/predict.py lite0-int8 chelsea.png
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from deploykit import load_bundle, load_images


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one line per image and class."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="a folder that `deploykit export` wrote")
    parser.add_argument("images", type=Path, nargs="+", help="image files")
    parser.add_argument("--top", type=int, default=3, help="classes to print for an image (default: %(default)s)")
    options = parser.parse_args(arguments)

    labels_file = options.bundle / "labels.txt"
    labels = labels_file.read_text(encoding="utf-8").splitlines() if labels_file.exists() else None
    with load_bundle(options.bundle) as engine:
        for path in options.images:
            logits = engine(load_images(path, engine.input_spec))[0].astype(np.float64)
            probabilities = np.exp(logits - logits.max())
            probabilities /= probabilities.sum()
            for index in np.argsort(-probabilities)[: options.top]:
                name = labels[index] if labels else f"class {index}"
                print(f"{path.name}: {name} ({probabilities[index]:.1%})")


if __name__ == "__main__":
    main()
