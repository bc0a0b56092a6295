"""Compare right FP32 engines with torch on random images many times, and print how often a gate raised an alarm.

    python benchmarks/false_alarms.py --comparisons 1000

One small network of each family with random weights of its own, as a classifier for one runtime and with a feature
pyramid for the other. Each comparison is `assert_parity` at its default gate on two images that no other one had, of
the kinds below in turn; every tenth is `verify_bundle` too, with its images in another order and noise of its own.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from _families import FAMILIES, classifier, smooth_images, with_pyramid

from deploykit import export_backbone, load_bundle, verify_bundle
from deploykit.arrays import FloatArray
from deploykit.assertion import compare_models
from deploykit.backbones.base import BaseBackbone

VERIFIED = 10
"""One of so many comparisons is a verification of the whole bundle too."""

ENGINES: dict[str, Callable[[str, int], BaseBackbone]] = {"onnxruntime": with_pyramid, "openvino": classifier}


def inputs(side: int, generator: np.random.Generator) -> Iterator[FloatArray]:
    """Two images at a time: smooth, noise, faint, bright, flat with one bright pixel."""
    shape = (2, 3, side, side)
    while True:
        yield smooth_images(side, 2, int(generator.integers(1 << 31)))
        yield generator.standard_normal(shape, dtype=np.float32)
        yield generator.standard_normal(shape, dtype=np.float32) * np.float32(0.01)
        yield generator.uniform(-2.5, 2.5, shape).astype(np.float32)
        flat = np.broadcast_to(generator.standard_normal((2, 3, 1, 1)), shape).astype(np.float32)
        flat[:, :, int(generator.integers(side)), int(generator.integers(side))] = 2.5
        yield flat


def alarms(bundle: Path, backbone: BaseBackbone, images: Iterator[FloatArray], count: int) -> Iterator[str]:
    """Compare an engine with the network that it was made from; what is wrong."""
    with load_bundle(bundle) as engine:
        for number, batch in enumerate(islice(images, count)):
            reports = [compare_models(engine, backbone, batch)]
            if number % VERIFIED == 0:
                reports.append(verify_bundle(bundle))
            for report in reports:
                yield from (f"{each.name}: {each.sqnr_db:.1f} dB {each.faults}" for each in report.failures())


def main() -> None:
    """Print one line an engine, and the sum."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(FAMILIES), choices=FAMILIES, metavar="NAME")
    parser.add_argument("--comparisons", type=int, default=1000, help="of all engines together, at least")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the images")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    each = -(-arguments.comparisons // (len(arguments.networks) * len(ENGINES)))
    compared = raised = 0
    with tempfile.TemporaryDirectory() as folder:
        for place, name in enumerate(arguments.networks):
            for runtime, network in ENGINES.items():
                seed = arguments.seed + place
                backbone, bundle = network(name, seed), Path(folder) / "bundle"
                export_backbone(backbone, bundle, runtime=runtime, precision="fp32", overwrite=True)
                random = np.random.default_rng([seed, len(runtime)])
                found = list(alarms(bundle, backbone, inputs(FAMILIES[name], random), each))
                compared, raised = compared + each, raised + len(found)
                print(f"{name} {runtime}: {len(found)} alarms in {each} comparisons {found[:2] or ''}", flush=True)
    print(f"{raised} false alarms in {compared} comparisons")


if __name__ == "__main__":
    main()
