"""The torch runtime: the module itself, in a dtype and on a device."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch

from deploykit.errors import DeviceUnavailable, SpecError
from deploykit.spec import Precision

if TYPE_CHECKING:
    from deploykit.backbones.base import BaseBackbone

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def place_module(backbone: BaseBackbone, precision: Precision, device: str) -> BaseBackbone:
    """Convert a backbone to a precision and move it to a device; inputs and outputs stay float32.

    Args:
        backbone: returned as it is for ``fp32`` on its own device; otherwise a converted copy.
        precision: FP32, FP16 or BF16.
        device: ``"auto"`` leaves the module where it is; otherwise a torch device.

    Raises:
        SpecError: a precision that eager torch does not have.
        DeviceUnavailable: the device is not here.
    """
    dtype = DTYPES.get(precision.name)
    if dtype is None:
        raise SpecError(
            f"the torch runtime has no {precision.name}; it has {', '.join(DTYPES)}. "
            "For int8 in torch choose runtime='torch_compile'."
        )
    if dtype != torch.float32:
        backbone = copy.deepcopy(backbone).to(dtype)
    backbone.precision = precision
    return backbone if device == "auto" else backbone.to(_device(device))


def torch_devices() -> tuple[str, ...]:
    """The devices of this machine that torch can use."""
    return ("cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count())))


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceUnavailable(f"torch knows no device {name!r}. Here are {', '.join(torch_devices())}.") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceUnavailable(f"the device {name!r} is not here. Here are {', '.join(torch_devices())}.")
    return device
