"""Checks of what a model is called with: every message says what was seen, what was expected and what to do."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any, cast

import numpy as np

from deploykit.arrays import Array, FloatArray, ImageArray
from deploykit.errors import SpecError
from deploykit.image_sizes import size_text
from deploykit.spec import InputSpec

_FLOAT = np.dtype(np.float32)
_DTYPES = {"float32": _FLOAT, "uint8": np.dtype(np.uint8)}


def check_images(images: Array, spec: InputSpec) -> ImageArray:
    """Return the images as one contiguous array of the input's dtype, or an error that says what is wrong with them.

    Raises:
        SpecError: wrong rank, layout, size, dtype or batch, or NaN or infinity.
    """
    if type(images) is not np.ndarray and "numpy.ma" in sys.modules and isinstance(images, np.ma.MaskedArray):
        raise SpecError("the images are a masked array; expected values everywhere. Fix: images.filled(0), say.")
    dtype = _DTYPES[spec.dtype]
    if images.dtype != dtype:
        raise SpecError(f"the images are {images.dtype}; expected {_expected(spec)}. Fix: {_cast_hint(images, spec)}.")
    if images.shape != spec.shape:  # which a call seldom is, and this is read anew between any two
        check_shape(images.shape, spec)
    values = cast("ImageArray", np.ascontiguousarray(images))
    if dtype is _FLOAT:
        _check_finite(values)
    return values


def check_shape(shape: tuple[int, ...], spec: InputSpec) -> None:
    """Refuse images of another shape than the input's.

    Raises:
        SpecError: wrong rank, layout, size or batch.
    """
    if len(shape) != 4:
        hint = " Add the batch dimension: images[None]." if len(shape) == 3 else ""
        raise SpecError(f"the images have shape {shape}; expected {_expected(spec)}.{hint}")
    if not spec.accepts_size(shape):
        hint = _layout_hint(shape, spec) or _size_hint(shape, spec)
        raise SpecError(f"the images have shape {shape}; expected {_expected(spec)}.{hint}")
    if not spec.accepts_batch(shape[0]):
        raise SpecError(
            f"the batch has {shape[0]} images and the model takes {spec.batch}. "
            "Export with batch_size='dynamic' (or a range) for other batches."
        )


def _expected(spec: InputSpec) -> str:
    sizes = f", {spec.sizes}" if spec.sizes is not None else ""
    return f"{spec.shape} {spec.dtype} {spec.layout}{sizes}"


def _cast_hint(images: Array, spec: InputSpec) -> str:
    """Return what to do with images of another dtype."""
    if spec.dtype == "float32":
        if images.dtype == np.uint8:
            return "decode and normalise first: deploykit.load_images(files, model.input_spec)"
        return "convert with .astype(np.float32)"
    if images.dtype.kind == "f":
        return (
            "pass the decoded pixels, 0 to 255, without mean and std, which are inside this engine: "
            "deploykit.load_images(files, model.input_spec)"
        )
    return "convert pixels from 0 to 255 with .astype(np.uint8)"


def _layout_hint(shape: tuple[int, ...], spec: InputSpec) -> str:
    """Return how to turn images that stand in the other layout; empty where they do not."""
    other = spec.as_pixels() if spec.layout == "NCHW" else spec.as_images()
    if not other.accepts_size(shape):
        return ""
    if spec.layout == "NCHW":
        return " These look like NHWC: use images.transpose(0, 3, 1, 2)."
    return " These look like NCHW: use images.transpose(0, 2, 3, 1)."


def _size_hint(shape: tuple[int, ...], spec: InputSpec) -> str:
    """Return which size of a range is nearest; empty where there is no range, or the channels are wrong too."""
    size = spec.size_of(shape)
    if spec.sizes is None or shape[1:] != spec.shape_at(1, size)[1:]:
        return ""
    return f" The nearest size is {size_text(spec.sizes.nearest(size))}: resize the images, or export another range."


def _check_finite(images: ImageArray) -> None:
    # One pass, in two streams at once and without a temporary: a NaN or an infinity in either half shows in the sum of
    # their products. Of numpy's products vdot alone is silent about numbers too large for it.
    flat = images.reshape(-1)
    half = flat.size // 2
    products = np.vdot(flat[: flat.size - half], flat[half:])
    if not math.isfinite(products) and not np.isfinite(images).all():
        bad = [int(index) for index in np.flatnonzero(~np.isfinite(images).all(axis=(1, 2, 3)))]
        raise SpecError(f"the images hold NaN or infinity (in batch positions {bad}); expected finite values.")


def check_tensor(images: Any, spec: InputSpec) -> Any:
    """Refuse what is not a dense torch tensor of the input's dtype; returns the module torch.

    Raises:
        SpecError: no tensor, a sparse one, or one of another dtype.
    """
    torch_module = sys.modules.get("torch")
    if torch_module is None or not isinstance(images, torch_module.Tensor):
        raise SpecError(
            f"the images are a {type(images).__name__}; expected a numpy.ndarray or a torch.Tensor. "
            "Files are read with deploykit.load_images(files, model.input_spec)."
        )
    check_has_values(images)
    if images.dtype != getattr(torch_module, spec.dtype) or images.layout != torch_module.strided:
        remedy = (
            "convert with .to_dense() and .float()"
            if spec.dtype == "float32"
            else "pass the decoded pixels, 0 to 255, without mean and std, which are inside this engine"
        )
        raise SpecError(
            f"the images are a {images.layout} tensor of {images.dtype}; expected a dense tensor of "
            f"torch.{spec.dtype}. Fix: {remedy}."
        )
    return torch_module


def check_has_values(images: Any) -> None:
    """Refuse tensors that are no array of values: meta and nested ones.

    Raises:
        SpecError: such a tensor.
    """
    if images.is_meta:
        raise SpecError(
            "the images are a meta tensor, which has no values. Fix: make them on a device that holds memory, "
            "such as torch.zeros(..., device='cpu')."
        )
    if images.is_nested:
        raise SpecError(
            "the images are a nested tensor, whose images may differ in size; expected one size. "
            "Fix: stack images of one size with torch.stack(images.unbind())."
        )


def _no_values(images: Any, reason: str) -> str:
    return (
        f"the images are a {type(images).__name__} whose values cannot be read ({reason}), as inside of torch.vmap, "
        "torch.func, torch.jit.trace and torch.export; an engine takes values. Fix: call it outside of them, with a "
        "plain tensor."
    )


def from_torch(images: Any, spec: InputSpec) -> tuple[ImageArray, Callable[[FloatArray], Any]]:
    """Return a torch tensor as an array that shares its memory, and the function that turns outputs back.

    Raises:
        SpecError: no tensor that the input takes, or one that stands for others in a trace or a transform.
    """
    torch_module = check_tensor(images, spec)
    device = images.device
    if torch_module.jit.is_tracing():
        raise SpecError(_no_values(images, "a trace would keep this call's answer for all images"))
    try:
        array = images.detach().cpu().resolve_neg().numpy()
    except RuntimeError as error:
        raise SpecError(_no_values(images, str(error))) from error
    return array, lambda output: torch_module.from_numpy(output).to(device)
