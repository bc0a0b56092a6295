"""The torch runtime: the module itself, in a dtype and on a device."""

from __future__ import annotations

from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from deploykit.arrays import FloatArray
from deploykit.backends.input_checks import check_images, check_shape, check_tensor
from deploykit.errors import DeviceUnavailable, SpecError
from deploykit.feature_dict import Features
from deploykit.predict import Prediction, predict
from deploykit.spec import InputSpec, Precision, Preprocessing

if TYPE_CHECKING:
    from deploykit.backbones.base import BaseBackbone
    from deploykit.images.preprocess import SomeImages

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def place_module(backbone: BaseBackbone, precision: Precision, device: str) -> BaseBackbone:
    """Convert a backbone to a precision and move it to a device; inputs and outputs stay float32.

    Args:
        backbone: returned as it is where it has the precision and is on the device; otherwise copied first.
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
            "Fix: choose a runtime with engines, which `deploykit list` shows with their precisions."
        )
    placed = backbone.placed(dtype, None if device == "auto" else _device(device))
    placed.precision = precision
    return placed


def place(
    backbone: BaseBackbone,
    precision: Precision,
    device: str,
    *,
    embed_preprocessing: bool,
    threads: int | None = None,
) -> BaseBackbone | PixelBackbone:
    """Return the module in a dtype and on a device, behind its preprocessing where that is asked for.

    A number of threads is set for all of torch in this process, which has no other.

    Raises:
        SpecError, DeviceUnavailable: as `place_module`.
    """
    placed = place_module(backbone, precision, device)
    if threads is not None:
        torch.set_num_threads(threads)
    return PixelBackbone(placed) if embed_preprocessing else placed


def torch_devices() -> tuple[str, ...]:
    """Return the devices of this machine that torch can use."""
    return ("cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count())))


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceUnavailable(f"torch knows no device {name!r}. Here are {', '.join(torch_devices())}.") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceUnavailable(f"the device {name!r} is not here. Here are {', '.join(torch_devices())}.")
    return device


def scale_and_shift(preprocessing: Preprocessing) -> tuple[FloatArray, FloatArray]:
    """Return 1/(255 * std) and -mean/std, ``(C,)`` each."""
    mean, std = np.asarray(preprocessing.mean, np.float64), np.asarray(preprocessing.std, np.float64)
    return (1 / (255 * std)).astype(np.float32), (-mean / std).astype(np.float32)


class PixelNormalization(nn.Module):
    """``(N, H, W, C)`` uint8 to ``(N, C, H, W)`` float32, normalised."""

    scale: Tensor
    shift: Tensor

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        scale, shift = scale_and_shift(preprocessing)
        self.register_buffer("scale", torch.from_numpy(scale).reshape(1, -1, 1, 1))
        self.register_buffer("shift", torch.from_numpy(shift).reshape(1, -1, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        """Cast, transpose, multiply and add."""
        images: Tensor = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        return images * self.scale + self.shift


class PixelBackbone(nn.Module):
    """A backbone called with uint8 pixels ``(N, H, W, C)``, normalised as its weights were trained.

    It answers as ``backbone`` does: a dict of feature maps, logits or the embedding; NumPy in gives
    NumPy out, without autograd.
    """

    runtime: ClassVar[str] = "torch"

    def __init__(self, backbone: BaseBackbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.input_spec = backbone.input_spec.as_pixels()
        self.spec = backbone.spec
        self.feature_info = backbone.feature_info
        self.precision = backbone.precision
        self.labels = backbone.labels
        self.normalization = PixelNormalization(backbone.input_spec.preprocessing).to(backbone.device)

    @property
    def device(self) -> str:
        """Where the parameters are: ``"cpu"``, ``"cuda:0"``."""
        return self.backbone.device

    def forward(self, pixels: Tensor) -> Any:
        """Normalise and run."""
        return self.backbone(self.normalization(pixels))

    def __call__(self, images: Any) -> Any:
        """Check the pixels, run, and answer in the caller's kind of array.

        Raises:
            SpecError: wrong type, rank, layout, channels, size or dtype.
        """
        if isinstance(images, np.ndarray):
            checked = check_images(images, self._spec_for(images.shape))
            # A decoder's arrays are often read-only, and torch warns at memory that it may not write.
            pixels = torch.from_numpy(checked if checked.flags.writeable else checked.copy())
            with torch.inference_mode():
                return _to_numpy(super().__call__(pixels.to(self.device)))
        check_tensor(images, self.input_spec)
        check_shape(tuple(images.shape), self._spec_for(tuple(images.shape)))
        return super().__call__(images)

    def predict(self, image: SomeImages, top: int = 5) -> list[Prediction] | list[list[Prediction]]:
        """Name the most probable classes of one image, or of each in a list; see `deploykit.predict.predict`."""
        return predict(self, self.spec, image, top)

    def close(self) -> None:
        """Nothing to give back: a torch module is freed with its last reference."""

    def __enter__(self) -> PixelBackbone:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _spec_for(self, shape: tuple[int, ...]) -> InputSpec:
        """Return the input with the size of these images, where the family takes any size."""
        fixed = self.backbone.fixed_size or self.input_spec.sizes is not None
        if fixed or len(shape) != 4 or shape[3] != self.input_spec.channels:
            return self.input_spec
        return replace(self.input_spec, height=shape[1], width=shape[2])


def _to_numpy(outputs: Tensor | Features[Tensor]) -> object:
    """Tensors, or features of them, as float32 arrays."""
    if isinstance(outputs, Features):
        return outputs.map(_to_numpy)
    array: object = outputs.float().cpu().numpy()
    return array
