"""Backbones that define `forward` alone: their levels are told from the sizes of the maps that they return."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from deploykit.backbones.features import levels_by_stride
from deploykit.errors import SpecError
from deploykit.feature_dict import Features


def with_indices(outputs: object, images: Tensor) -> object:
    """Give a dict of maps ``(N, C, H, W)`` a level's index by each map's stride; other answers stay as they are."""
    if not isinstance(outputs, Mapping) or isinstance(outputs, Features) or not outputs:
        return outputs
    if not all(isinstance(name, str) and _is_map(feature) for name, feature in outputs.items()):
        return outputs
    strides = {name: max(1, round(images.shape[-2] / feature.shape[-2])) for name, feature in outputs.items()}
    names = sorted(strides, key=lambda name: strides[name])
    levels = levels_by_stride([strides[name] for name in names], [outputs[name].shape[1] for name in names])
    return Features(outputs, {level.index: name for level, name in zip(levels, names, strict=True)})


def to_tensor(images: object, device: torch.device) -> Tensor:
    """NumPy images ``(N, C, H, W)`` as a tensor of its own, on a device.

    Raises:
        SpecError: another type, or an array that is not of numbers.
    """
    if not isinstance(images, np.ndarray) or images.dtype.kind not in "fiub":
        kind = f"an array of {images.dtype}" if isinstance(images, np.ndarray) else type(images).__name__
        raise SpecError(f"the images are {kind}; expected a numpy.ndarray or a torch.Tensor (N, C, H, W).")
    return torch.tensor(images, device=device)


def to_numpy(outputs: object) -> object:
    """Return the tensors of an answer, nested as they are, as float32 arrays."""
    if isinstance(outputs, Features):
        return outputs.map(to_numpy)
    if isinstance(outputs, Mapping):
        return {name: to_numpy(output) for name, output in outputs.items()}
    if isinstance(outputs, (list, tuple)):
        return [to_numpy(output) for output in outputs]
    return outputs.float().cpu().numpy() if isinstance(outputs, Tensor) else outputs


def _is_map(feature: object) -> bool:
    return isinstance(feature, Tensor) and feature.dim() == 4
