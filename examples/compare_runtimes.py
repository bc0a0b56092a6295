"""Run two bundles on the same images and print how far apart their outputs are: two runtimes, precisions or releases.

Example: python examples/compare_runtimes.py lite0-onnxruntime lite0-openvino photos/
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from deploykit import load_bundle, load_images
from deploykit.parity.metrics import sqnr_db


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one line per output of the two engines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", type=Path, help="a bundle")
    parser.add_argument("candidate", type=Path, help="another bundle of the same backbone")
    parser.add_argument("photos", type=Path, help="a folder of images")
    options = parser.parse_args(arguments)

    files = sorted(path for path in options.photos.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    with load_bundle(options.reference) as reference, load_bundle(options.candidate) as candidate:
        print(f"{reference}\n{candidate}")
        if reference.manifest.weights_digest != candidate.manifest.weights_digest:
            print("the two bundles hold different weights")
        for path in files:
            images = load_images(path, reference.input_spec)
            expected, found = reference(images), candidate(images)
            if not isinstance(expected, dict):
                expected, found = {"output": expected}, {"output": found}
            figures = ", ".join(f"{name} {sqnr_db(expected[name], found[name]):.1f} dB" for name in expected)
            print(f"{path.name}: {figures}")


if __name__ == "__main__":
    main()
