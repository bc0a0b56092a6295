"""Quantization-aware training on labelled images: how near engines come to the trained module, and what it wins back.

Networks trained on Fashion-MNIST are prepared by their family's recipe and trained on by AdamW for some steps, for each
runtime; with --outliers, some channels are loud (`_outliers.py`) and the recipe is ``plain``, so that there is
something to win back. A row gives the SQNR of the engine's logits against those of the module with its roundings, and
top-1 in FP32, after calibration alone and after training, in the engine.
"""

from __future__ import annotations

import tempfile
from argparse import Namespace
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _fashion import FOLDER, Clothes, read_clothes
from _from_tests import keep_tables
from _narrow import register
from _outliers import with_outliers
from _results import machine_line, parser, save, silence
from _trained import BATCH, NETWORKS, Labelled, Network, labelled, trained
from torch.nn import functional as F

import deploykit
from deploykit.arrays import FloatArray
from deploykit.errors import DeployKitError
from deploykit.parity.metrics import sqnr_db
from deploykit.spec import Int8

RUNTIMES = ("onnxruntime", "openvino")
QUICK = ("resnet_narrow", "vit_narrow")
FAMILY, PLAIN = Int8(min_sqnr_db=-30.0), Int8(recipe="plain", min_sqnr_db=-30.0)
CALIBRATED = 64
RATE = 1e-4


@dataclass(frozen=True, kw_only=True)
class Row:
    """A network in a runtime: dB of the engine against the module, and top-1 in percent."""

    network: str
    runtime: str
    engine_db: float
    fp32: float
    calibrated: float
    trained: float


def top1(logits: FloatArray, images: Labelled) -> float:
    """The percentage of images whose class is named."""
    return 100 * float((logits.argmax(1) == images.labels).mean())


def engine_logits(bundle: Path, images: FloatArray) -> FloatArray:
    """What an engine gives, one image at a time."""
    with deploykit.load_bundle(bundle) as engine:
        return np.concatenate([engine(image[None]) for image in images])


def module_logits(module: torch.nn.Module, images: FloatArray) -> FloatArray:
    """What a module gives, one image at a time."""
    with torch.inference_mode():
        return np.concatenate([module(torch.from_numpy(image[None])).numpy() for image in images])


def fit(module: torch.nn.Module, data: Labelled, steps: int) -> None:
    """Train on batches in their order."""
    optimizer = torch.optim.AdamW(module.parameters(), RATE)
    images, labels = torch.from_numpy(data.images), torch.from_numpy(data.labels)
    for step in range(steps):
        batch = slice(step * BATCH % len(images), step * BATCH % len(images) + BATCH)
        loss = F.cross_entropy(module(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def measure(backbone: Any, options: Namespace, runtime: str, training: Labelled, testing: Labelled) -> Row:
    """Quantize, train and export a network for a runtime."""
    torch.manual_seed(0)
    settings, calibration = PLAIN if options.outliers else FAMILY, training.images[:CALIBRATED]
    module = deploykit.prepare_qat(backbone, calibration, runtime=runtime, precision=settings)
    with tempfile.TemporaryDirectory(prefix="deploykit-qat-") as scratch:
        before, after = Path(scratch) / "before", Path(scratch) / "after"
        deploykit.export_backbone(backbone, before, runtime=runtime, precision=settings, calibration=calibration)
        fit(module, training, options.steps)
        deploykit.export_backbone(module, after, precision=settings)
        found = engine_logits(after, testing.images)
        return Row(
            network=backbone.spec.name,
            runtime=runtime,
            engine_db=sqnr_db(module_logits(module, testing.images), found),
            fp32=top1(module_logits(backbone, testing.images), testing),
            calibrated=top1(engine_logits(before, testing.images), testing),
            trained=top1(found, testing),
        )


def options_of(arguments: list[str] | None) -> Namespace:
    """Return the options of the command line."""
    made = parser(__doc__)
    names = [network.name for network in NETWORKS]
    made.add_argument("--networks", nargs="+", default=None, choices=names, metavar="NAME", help="default: all")
    made.add_argument("--runtimes", nargs="+", default=RUNTIMES, metavar="NAME", help="default: both")
    made.add_argument("--steps", type=int, default=60, help="of training, 64 images each (default: %(default)s)")
    made.add_argument("--outliers", action="store_true", help="plant loud channels, and use the recipe plain")
    made.add_argument("--images", type=int, default=1000, help="test images (default: %(default)s)")
    made.add_argument("--data", type=Path, default=FOLDER, metavar="FOLDER", help="(default: %(default)s)")
    made.add_argument("--work", type=Path, metavar="FOLDER", help="keeps the weights in FP32 (default: none)")
    return made.parse_args(arguments)


def rows_of(network: Network, data: tuple[Clothes, Clothes], options: Namespace, work: Path) -> list[Row]:
    """Measure a network in every runtime; each row is printed as soon as it is there."""
    clothes, others = data
    training = labelled(clothes, network.steps * BATCH, network.side, clothes)
    testing = labelled(others, options.images, network.side, clothes)
    backbone, rows = trained(network, training, work), []
    if options.outliers:
        backbone, _ = with_outliers(backbone)
    for runtime in options.runtimes:
        row = measure(backbone, options, runtime, training, testing)
        shown = f"{row.fp32:>8.1f}{row.calibrated:>12.1f}{row.trained:>9.1f}"
        print(f"{row.network:<24}{row.runtime:<14}{row.engine_db:>10.1f}{shown}", flush=True)
        rows.append(row)
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Print a row a network and runtime."""
    options = options_of(arguments)
    silence()
    register()
    chosen = options.networks or (QUICK if options.quick else [network.name for network in NETWORKS])
    print(machine_line())
    print(f"{'network':<24}{'runtime':<14}{'engine dB':>10}{'FP32 %':>8}{'calibrated':>12}{'trained':>9}")
    with tempfile.TemporaryDirectory(prefix="deploykit-trained-") as scratch, pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEPLOYKIT_CACHE", f"{scratch}/cache")
        keep_tables(patch)
        work = options.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        try:
            data = read_clothes(options.data)
            rows = [row for each in NETWORKS if each.name in chosen for row in rows_of(each, data, options, work)]
        except DeployKitError as error:
            raise SystemExit(str(error)) from error
    save(options.json, rows=[asdict(row) for row in rows])


if __name__ == "__main__":
    main()
