"""Top-1 accuracy lost to INT8 on labelled images: scikit-learn's handwritten digits, networks trained here.

Each backbone is trained from random weights on two thirds of the 1797 digits, scaled up from 8x8; the
accuracy is that of the last third in torch FP32 and in INT8 in each runtime, calibrated on training images.
"""

from __future__ import annotations

import argparse
import time
import warnings
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional as F

import deploykit
from deploykit.runtimes.base import FloatArray

RUNTIMES = ("onnxruntime", "openvino")
CALIBRATED = 128


@dataclass(frozen=True, kw_only=True)
class Network:
    """A backbone for digits of ``side`` pixels, trained for ``epochs``."""

    name: str
    side: int
    epochs: int
    rate: float
    patch_size: int | None = None


NETWORKS = (
    Network(name="resnet18", side=32, epochs=6, rate=1e-3),
    Network(name="mobilenetv3_small_100", side=64, epochs=25, rate=2e-3),
    Network(name="vit_tiny_patch16_224", side=32, epochs=25, rate=5e-4, patch_size=8),
    Network(name="swin_tiny_patch4_window7_224", side=32, epochs=8, rate=3e-4),
)


@dataclass(frozen=True, kw_only=True)
class Digits:
    """Images ``(N, 1, side, side)`` with mean 0 and deviation 1, and their classes ``(N,)``."""

    images: FloatArray
    labels: npt.NDArray[np.int64]


def digits(side: int) -> tuple[Digits, Digits]:
    """The training and the test part, shuffled from a fixed seed."""
    from sklearn.datasets import load_digits

    source = load_digits()
    small = torch.from_numpy(source.images[:, None].astype(np.float32))
    large = F.interpolate(small, size=(side, side), mode="bilinear").numpy()
    large = (large - large.mean()) / large.std()
    order = np.random.default_rng(0).permutation(len(large))
    cut = 2 * len(large) // 3
    return tuple(  # type: ignore[return-value]
        Digits(images=large[part], labels=source.target[part]) for part in (order[:cut], order[cut:])
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


def accuracy(model: nn.Module | deploykit.runtimes.base.Runtime, data: Digits) -> float:
    """Top-1 in percent."""
    with torch.no_grad():
        found = [np.asarray(model(torch.from_numpy(image[None]))).argmax() for image in data.images]
    return 100 * float(np.mean(np.array(found) == data.labels))


def main() -> None:
    """Train, quantize and print a row a network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=[network.name for network in NETWORKS])
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print(f"{'network':<30} {'FP32 %':>7} " + " ".join(f"{runtime + ' %':>15} {'drop':>6}" for runtime in RUNTIMES))
    for network in (each for each in NETWORKS if each.name in options.networks):
        start = time.perf_counter()
        training, testing = digits(network.side)
        torch.manual_seed(0)
        backbone = deploykit.create_backbone(
            network.name, num_classes=10, in_channels=1, image_size=network.side, patch_size=network.patch_size
        )
        train(backbone, training, network.epochs, network.rate)
        before = accuracy(backbone, testing)
        cells = []
        for runtime in RUNTIMES:
            with deploykit.create_backbone(
                backbone,
                runtime=runtime,
                precision="int8",
                calibration=training.images[:CALIBRATED],
                cache=False,
            ) as engine:
                after = accuracy(engine, testing)
            cells.append(f"{after:15.2f} {before - after:6.2f}")
        seconds = time.perf_counter() - start
        print(f"{network.name:<30} {before:7.2f} {' '.join(cells)}   ({seconds:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
