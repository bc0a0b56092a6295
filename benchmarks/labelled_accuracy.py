"""Top-1 accuracy lost to INT8 on labelled images: scikit-learn's handwritten digits, networks trained here.

Each backbone is trained from random weights on half of the 1797 digits, scaled up from 8x8; the accuracy is
that of the other half in torch FP32 and in INT8 in each runtime, one image a call, calibrated on training
images. TensorRT's column is a proxy: its INT8 graph run node by node in ONNX Runtime, since its plans need a GPU.

With --work FOLDER trained weights and finished cells are kept there, and a stopped run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _trained import Labelled, Network, enlarged, trained

import deploykit
from deploykit.arrays import FloatArray
from deploykit.backends.tensorrt.passes import DIALECT
from deploykit.calibration.images import calibration_set
from deploykit.calibration.recipes import with_recipe
from deploykit.export.job import ExportJob, checked
from deploykit.export.pipeline import prepare
from deploykit.onnx_session import onnx_session
from deploykit.options import ExportOptions
from deploykit.progress import quiet
from deploykit.spec import Int8
from deploykit.unset import UNSET

CALIBRATED = 128
PROXY = "tensorrt (proxy)"
COLUMNS = ("onnxruntime", "openvino", "torch_compile", PROXY)


NETWORKS = (
    Network(name="resnet18", side=32, steps=140, rate=1e-3),
    Network(name="mobilenetv3_small_100", side=64, steps=420, rate=3e-3),
    Network(name="vit_tiny_patch16_224", side=32, steps=420, rate=5e-4, patch_size=8),
    Network(name="swin_tiny_patch4_window7_224", side=32, steps=168, rate=3e-4),
)


def digits(side: int) -> tuple[Labelled, Labelled]:
    """The half to train on and the half to test on, shuffled from a fixed seed."""
    from sklearn.datasets import load_digits

    source = load_digits()
    large = enlarged(source.images, side)
    large = (large - large.mean()) / large.std()
    order = np.random.default_rng(0).permutation(len(large))
    half = len(large) // 2
    training, testing = (
        Labelled(images=large[part], labels=source.target[part]) for part in (order[:half], order[half:])
    )
    return training, testing


def accuracy(call: Callable[[FloatArray], Any], data: Labelled) -> float:
    """Top-1 in percent of a model that takes one image a call."""
    found = [int(np.asarray(call(image[None])).argmax()) for image in data.images]
    return 100 * float(np.mean(np.array(found) == data.labels))


def in_torch(backbone: Any, data: Labelled) -> float:
    """Top-1 in percent of torch FP32."""
    with torch.inference_mode():
        return accuracy(lambda image: backbone(torch.from_numpy(image)), data)


def in_runtime(backbone: Any, runtime: str, settings: Int8, calibration: FloatArray, data: Labelled) -> float:
    """Top-1 in percent of INT8 in a runtime, or of its proxy."""
    if runtime == PROXY:
        return accuracy(_tensorrt_proxy(backbone, settings, calibration), data)
    with deploykit.create_backbone(
        backbone, runtime=runtime, precision=settings, calibration=calibration, cache=False
    ) as engine:
        return accuracy(engine, data)


def _tensorrt_proxy(backbone: Any, settings: Int8, calibration: FloatArray) -> Callable[[FloatArray], Any]:
    images = calibration_set(calibration, backbone.input_spec)
    options = ExportOptions(runtime="onnxruntime", precision=with_recipe(settings, backbone.family), cache=False)
    network = prepare(checked(ExportJob(backbone=backbone, options=options, images=images)), quiet)
    session = onnx_session(DIALECT.render(network.master.onnx, network.plan, network.probe).graph.model, optimize=False)
    return lambda image: session.run(["logits"], {"images": image})[0]


def measure(network: Network, columns: tuple[str, ...], settings: Int8, work: Path) -> None:
    """Train a network, measure each column, and print its row; what the work folder holds is not done again."""
    start = time.perf_counter()
    training, testing = digits(network.side)
    backbone = trained(network, training, work)
    chosen = "recipe" if settings.calibrator is UNSET else settings.calibrator
    kept = work / f"{network.name}-{chosen}.json"
    cells: dict[str, float] = json.loads(kept.read_text()) if kept.exists() else {}
    for column in ("fp32", *columns):
        if column not in cells:
            if column == "fp32":
                cells[column] = in_torch(backbone, testing)
            else:
                cells[column] = in_runtime(backbone, column, settings, training.images[:CALIBRATED], testing)
            kept.write_text(json.dumps(cells))
    before = cells["fp32"]
    row = " ".join(f"{cells[column]:17.2f} {before - cells[column]:6.2f}" for column in columns)
    print(f"{network.name:<30} {before:7.2f} {row}   ({time.perf_counter() - start:.0f} s)", flush=True)


def main() -> None:
    """Train, quantize and print a row a network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=[network.name for network in NETWORKS])
    parser.add_argument("--runtimes", nargs="+", default=COLUMNS, choices=COLUMNS, help="columns (default: all)")
    parser.add_argument("--calibrator", help="default: the recipe's of the family")
    parser.add_argument("--work", type=Path, help="a folder that keeps weights and finished cells (default: none)")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    columns = tuple(options.runtimes)
    print(f"top-1 in %, and what is lost from FP32, of {len(digits(8)[1].labels)} digits that were not trained on")
    print(f"{'network':<30} {'FP32':>7} " + " ".join(f"{column:>17} {'lost':>6}" for column in columns))
    with tempfile.TemporaryDirectory(prefix="deploykit-digits-") as scratch:
        work = options.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        for network in (each for each in NETWORKS if each.name in options.networks):
            measure(network, columns, Int8(calibrator=options.calibrator or UNSET), work)


if __name__ == "__main__":
    main()
