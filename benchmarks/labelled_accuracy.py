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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional as F

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


@dataclass(frozen=True, kw_only=True)
class Network:
    """A backbone for digits of ``side`` pixels, trained for ``epochs``."""

    name: str
    side: int
    epochs: int
    rate: float
    patch_size: int | None = None


NETWORKS = (
    Network(name="resnet18", side=32, epochs=10, rate=1e-3),
    Network(name="mobilenetv3_small_100", side=64, epochs=30, rate=3e-3),
    Network(name="vit_tiny_patch16_224", side=32, epochs=30, rate=5e-4, patch_size=8),
    Network(name="swin_tiny_patch4_window7_224", side=32, epochs=12, rate=3e-4),
)


@dataclass(frozen=True, kw_only=True)
class Digits:
    """Images ``(N, 1, side, side)`` with mean 0 and deviation 1, and their classes ``(N,)``."""

    images: FloatArray
    labels: npt.NDArray[np.int64]


def digits(side: int) -> tuple[Digits, Digits]:
    """The half to train on and the half to test on, shuffled from a fixed seed."""
    from sklearn.datasets import load_digits

    source = load_digits()
    small = torch.from_numpy(source.images[:, None].astype(np.float32))
    large = F.interpolate(small, size=(side, side), mode="bilinear").numpy()
    large = (large - large.mean()) / large.std()
    order = np.random.default_rng(0).permutation(len(large))
    half = len(large) // 2
    training, testing = (
        Digits(images=large[part], labels=source.target[part]) for part in (order[:half], order[half:])
    )
    return training, testing


def build(network: Network) -> Any:
    """The backbone with random weights from a fixed seed."""
    torch.manual_seed(0)
    return deploykit.create_backbone(
        network.name, num_classes=10, in_channels=1, image_size=network.side, patch_size=network.patch_size
    )


def train(model: nn.Module, data: Digits, epochs: int, rate: float) -> None:
    """AdamW with a one-cycle schedule on batches of 64, shifted by up to a tenth of the side."""
    torch.manual_seed(0)
    images, labels = torch.from_numpy(data.images), torch.from_numpy(data.labels)
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.05)
    steps = epochs * (len(images) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    reach = images.shape[-1] // 10
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images))[: len(images) // 64 * 64].reshape(-1, 64):
            shift = tuple(int(value) for value in torch.randint(-reach, reach + 1, (2,)))
            loss = F.cross_entropy(model(torch.roll(images[batch], shift, (2, 3))), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


def trained(network: Network, data: Digits, work: Path) -> Any:
    """The trained backbone; its weights are read from the work folder where they are there."""
    backbone, path = build(network), work / f"{network.name}.pt"
    if path.exists():
        backbone.load_state_dict(torch.load(path, weights_only=True))
        return backbone.eval()
    train(backbone, data, network.epochs, network.rate)
    partial = path.with_suffix(".partial")
    torch.save(backbone.state_dict(), partial)
    partial.rename(path)
    return backbone


def accuracy(call: Callable[[FloatArray], Any], data: Digits) -> float:
    """Top-1 in percent of a model that takes one image a call."""
    found = [int(np.asarray(call(image[None])).argmax()) for image in data.images]
    return 100 * float(np.mean(np.array(found) == data.labels))


def in_torch(backbone: Any, data: Digits) -> float:
    """Top-1 in percent of torch FP32."""
    with torch.inference_mode():
        return accuracy(lambda image: backbone(torch.from_numpy(image)), data)


def in_runtime(backbone: Any, runtime: str, settings: Int8, calibration: FloatArray, data: Digits) -> float:
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
