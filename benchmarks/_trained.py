"""Small backbones trained on labelled images, with weights that a stopped run finds again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from _fashion import Clothes
from torch import Tensor, nn
from torch.nn import functional as F

import deploykit
from deploykit.arrays import FloatArray

BATCH = 64
CLASSES = 10


@dataclass(frozen=True, kw_only=True)
class Network:
    """A backbone for grey images of ``side`` pixels, trained for ``steps`` batches with ``rate`` at its highest."""

    name: str
    side: int
    steps: int
    rate: float
    patch_size: int | None = None


NETWORKS = (
    Network(name="resnet_narrow", side=32, steps=300, rate=2e-3),
    Network(name="resnetv2_narrow", side=32, steps=300, rate=2e-3),
    Network(name="efficientnet_narrow", side=64, steps=600, rate=3e-3),
    Network(name="mobilenetv2_050", side=64, steps=2400, rate=3e-3),
    Network(name="mobilenetv3_small_075", side=64, steps=2400, rate=3e-3),
    Network(name="regnety_002", side=32, steps=1000, rate=2e-3),
    Network(name="vit_narrow", side=32, steps=300, rate=1e-3),
    Network(name="hybrid_narrow", side=32, steps=200, rate=1e-3),
    Network(name="mobilevit_narrow", side=32, steps=250, rate=3e-3),
    Network(name="coatnet_narrow", side=32, steps=300, rate=2e-3),
    Network(name="convnext_narrow", side=32, steps=300, rate=2e-3),
    Network(name="swin_narrow", side=32, steps=400, rate=2e-3),
)
"""One a family."""


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """Images ``(N, 1, side, side)`` with mean 0 and deviation 1, and their classes ``(N,)``."""

    images: FloatArray
    labels: npt.NDArray[np.int64]


def labelled(clothes: Clothes, count: int, side: int, like: Clothes) -> Labelled:
    """Return the first images enlarged, with mean 0 and deviation 1 for those of ``like``."""
    mean, deviation = float(like.images.mean()), float(like.images.std())
    images = (enlarged(clothes.images[:count], side) - mean) / deviation
    return Labelled(images=images, labels=clothes.labels[:count])


def enlarged(images: npt.NDArray[np.generic], side: int) -> FloatArray:
    """Scale grey images ``(N, H, W)`` to ``(N, 1, side, side)``, bilinear."""
    small = torch.from_numpy(images[:, None].astype(np.float32))
    large: FloatArray = F.interpolate(small, size=(side, side), mode="bilinear").numpy()
    return large


def trained(network: Network, data: Labelled, work: Path) -> Any:
    """Return the trained backbone; its weights are read from the work folder where they are there."""
    torch.manual_seed(0)
    backbone = deploykit.create_backbone(
        network.name, num_classes=CLASSES, in_channels=1, image_size=network.side, patch_size=network.patch_size
    )
    path = work / f"{network.name}-{network.steps}.pt"
    if path.exists():
        backbone.load_state_dict(torch.load(path, weights_only=True))
        return backbone.eval()
    train(backbone, data, network.steps, network.rate)
    partial = path.with_suffix(".partial")
    torch.save(backbone.state_dict(), partial)
    partial.rename(path)
    return backbone


def train(model: nn.Module, data: Labelled, steps: int, rate: float) -> None:
    """Train by AdamW with a one-cycle schedule on batches of 64, shifted by up to a tenth of the side."""
    torch.manual_seed(0)
    model.to(memory_format=torch.channels_last)  # in which a processor's convolutions train fastest
    images, labels = torch.from_numpy(data.images), torch.from_numpy(data.labels)
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    reach = images.shape[-1] // 10
    model.train()
    for batch in islice(_batches(len(images)), steps):
        shift = tuple(int(value) for value in torch.randint(-reach, reach + 1, (2,)))
        shifted = torch.roll(images[batch], shift, (2, 3)).contiguous(memory_format=torch.channels_last)
        loss = F.cross_entropy(model(shifted), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()


def _batches(count: int) -> Iterator[Tensor]:
    """Yield positions, 64 at a time, without end; each pass is shuffled anew and leaves out what fills no batch."""
    while True:
        yield from torch.randperm(count)[: count // BATCH * BATCH].reshape(-1, BATCH)
