"""Resize, crop and normalise images as the weights were trained, from files, bytes, pictures or pixels."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeAlias, TypeGuard

import numpy as np
import numpy.typing as npt
from PIL import Image

from deploykit.arrays import Array, FloatArray, ImageArray
from deploykit.errors import ImageError, SpecError
from deploykit.images.decode import decode_bytes, decode_file, decode_picture
from deploykit.spec import InputSpec, Preprocessing

MOST_RESIZED_PIXELS = 2**24
"""A picture that would be resized to more is cropped first, so that a thin one does not fill the memory."""
TAKEN = (
    "a path, the bytes of an image file, a PIL image, an array of uint8 (H, W) or (H, W, 3) in RGB, or a list of these"
)
_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}

PixelArray: TypeAlias = npt.NDArray[np.uint8]
PathLike: TypeAlias = str | os.PathLike[str]
OneImage: TypeAlias = "PathLike | bytes | bytearray | memoryview | Image.Image | Array"
SomeImages: TypeAlias = "OneImage | Iterable[OneImage]"


def preprocess(image: SomeImages, spec: InputSpec) -> ImageArray:
    """Turn images into what a model is called with, as timm's evaluation transform does.

    Args:
        image: a path; the bytes of an image file; a PIL image; an array of uint8, ``(H, W)`` in grey or
            ``(H, W, C)`` in RGB or RGBA; or a list of these. Pictures are turned upright by their EXIF
            orientation; alpha is dropped; nothing given is changed.
        spec: a model's ``input_spec``: size, channels and preprocessing.

    Returns:
        ``(N, C, H, W)`` float32, normalised; or ``(N, H, W, C)`` uint8, resized and cropped, where
        ``spec.embeds_preprocessing``. N is 1 for one image, and the length of a list.

    Raises:
        ImageError: an image is missing, damaged, or in a mode without a known white; each one is named.
        SpecError: something else than an image, or a model whose channels no photograph has.
    """
    _check_spec(spec)
    sources = [image] if is_one_image(image) else _listed(image)
    single = len(sources) == 1 and sources[0] is image
    prepared: list[ImageArray] = []
    problems: list[str] = []
    for position, source in enumerate(sources):
        try:
            prepared.append(prepare_image(decode(source, "the image" if single else f"image {position}"), spec))
        except ImageError as error:
            problems.append(str(error))
    if problems:
        raise ImageError("\n".join(problems))
    if not prepared:
        raise ImageError(f"no image files were given, and no images in memory; expected {TAKEN}.")
    return np.stack(prepared)


def load_images(files: SomeImages, spec: InputSpec) -> ImageArray:
    """Decode and preprocess image files, or images in memory, as `preprocess` does; one image is a batch of one."""
    return preprocess(files, spec)


def read_image(path: Path, spec: InputSpec) -> ImageArray:
    """Turn one file into ``(C, H, W)`` float32 or ``(H, W, C)`` uint8.

    Raises:
        ImageError, SpecError: as `preprocess`.
    """
    return prepare_image(decode_file(path), spec)


def is_one_image(image: object) -> TypeGuard[OneImage]:
    """Return whether this is one image, and not several or something else."""
    return isinstance(image, (str, os.PathLike, bytes, bytearray, memoryview, Image.Image, np.ndarray))


def decode(source: object, name: str) -> Image.Image:
    """Turn one image into an upright picture, 8-bit grey or RGB.

    Args:
        source: one of `OneImage`.
        name: what messages call it where it has no path.

    Raises:
        ImageError, SpecError: as `preprocess`.
    """
    if isinstance(source, (str, os.PathLike)):
        return decode_file(Path(os.fsdecode(source)))
    if isinstance(source, (bytes, bytearray, memoryview)):
        return decode_bytes(source, f"{name} ({memoryview(source).nbytes} bytes)")
    if isinstance(source, Image.Image):
        return decode_picture(source, name)
    if isinstance(source, np.ndarray):
        return decode_picture(_picture(source, name), name)
    raise SpecError(f"{name} is {_seen(source)}; expected {TAKEN}.{_remedy(source)}")


def prepare_image(picture: Image.Image, spec: InputSpec) -> ImageArray:
    """Turn a picture, 8-bit grey or RGB, into ``(C, H, W)`` float32, normalised.

    Where the engine embeds the preprocessing: into ``(H, W, C)`` uint8, resized and cropped only.

    Raises:
        SpecError: the model takes neither 1 nor 3 channels, so a photograph does not fit it.
    """
    if spec.channels not in (1, 3):
        raise SpecError(
            f"the model takes {spec.channels} channels and an image file has 1 or 3. "
            f"Pass arrays of shape (N, {', '.join(map(str, spec.shape_at(1)[1:]))}) instead of files."
        )
    fitted = _fit(picture if spec.channels == 3 or picture.mode == "L" else picture.convert("L"), spec)
    pixels = np.array(fitted, np.uint8).reshape(spec.height, spec.width, spec.channels)
    return pixels if spec.embeds_preprocessing else normalize(pixels, spec.preprocessing)


def normalize(pixels: ImageArray, preprocessing: Preprocessing) -> FloatArray:
    """Turn pixels ``(..., H, W, C)``, 0 to 255, into ``(..., C, H, W)`` with mean and std, in FP32."""
    mean, std = (np.asarray(values, np.float32) for values in (preprocessing.mean, preprocessing.std))
    if pixels.dtype != np.uint8 or mean.size not in (1, pixels.shape[-1]):
        scaled = (pixels.astype(np.float32) / 255 - mean) / std
        return np.ascontiguousarray(np.moveaxis(scaled, -1, -3))
    # One look-up a value instead of four passes: the table has the same arithmetic, and gives the same bits.
    values = (np.arange(256, dtype=np.float32)[:, None] / 255 - mean) / std
    images = np.empty((*pixels.shape[:-3], pixels.shape[-1], *pixels.shape[-3:-1]), np.float32)
    for channel in range(pixels.shape[-1]):
        table = np.ascontiguousarray(values[:, min(channel, values.shape[1] - 1)])
        images[..., channel, :, :] = table[pixels[..., channel]]
    return images


def denormalize(images: FloatArray, preprocessing: Preprocessing) -> PixelArray:
    """Turn images ``(..., C, H, W)`` into the nearest pixels ``(..., H, W, C)``: `normalize` undone."""
    mean, std = (np.asarray(values, np.float64) for values in (preprocessing.mean, preprocessing.std))
    scaled = (np.moveaxis(images, -3, -1) * std + mean) * 255
    return np.ascontiguousarray(np.rint(scaled).clip(0, 255).astype(np.uint8))


def network_images(given: ImageArray, spec: InputSpec) -> FloatArray:
    """Return what the network inside an engine sees, ``(N, C, H, W)``, when the engine is called with ``given``."""
    return normalize(given, spec.preprocessing) if spec.embeds_preprocessing else np.asarray(given, np.float32)


def _check_spec(spec: object) -> None:
    if not isinstance(spec, InputSpec):
        raise SpecError(f"spec is {_seen(spec)}; expected an InputSpec. Fix: pass model.input_spec.")


def _listed(images: object) -> list[object]:
    """Several images as a list."""
    is_file = isinstance(images, io.IOBase) or hasattr(images, "read")
    if is_file or hasattr(images, "detach") or isinstance(images, (Mapping, set)) or not isinstance(images, Iterable):
        raise SpecError(f"the image is {_seen(images)}; expected {TAKEN}.{_remedy(images)}")
    return list(images)


def _picture(array: Array, name: str) -> Image.Image:
    """Return an array of pixels as a picture that shares its memory."""
    channels = array.shape[2:] or (1,)
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or channels[0] not in (1, 3, 4) or not array.size:
        raise SpecError(
            f"{name} is an array of {array.dtype} {array.shape}; expected uint8 (H, W), (H, W, 3) in RGB or "
            f"(H, W, 4) in RGBA, not empty.{_array_remedy(array)}"
        )
    return Image.fromarray(np.ascontiguousarray(array[..., 0] if array.ndim == 3 and channels[0] == 1 else array))


def _array_remedy(array: Array) -> str:
    if array.dtype == np.uint8 and array.ndim == 3 and array.shape[0] in (1, 3, 4):
        return " Fix: this looks like (C, H, W), so pass array.transpose(1, 2, 0)."
    if array.dtype == np.uint8 and array.ndim == 4:
        return " Fix: pass list(array) for several images."
    if array.dtype.kind == "f":
        return (
            " Fix: pixels from 0 to 1 become (array * 255).round().astype(np.uint8); images that are normalised "
            "already are what model(images) takes."
        )
    return " Fix: scale to 0..255 and convert with .astype(np.uint8)." if array.dtype.kind in "iub" else ""


def _seen(value: object) -> str:
    kind = type(value).__name__
    shape = getattr(value, "shape", None)
    return f"a {kind} of shape {tuple(shape)}" if isinstance(shape, tuple) else f"a {kind}"


def _remedy(value: object) -> str:
    if hasattr(value, "read"):
        return " Fix: pass file.read()."
    if hasattr(value, "detach"):
        return " Fix: pass tensor.numpy(), uint8 (H, W, 3); normalised images are what model(images) takes."
    return ""


def _fit(picture: Image.Image, spec: InputSpec) -> Image.Image:
    """Resize and crop to the spec's size; grey becomes RGB where the model takes three channels."""
    how = spec.preprocessing
    target = (math.floor(spec.height / how.crop_pct), math.floor(spec.width / how.crop_pct))
    height, width = _resized(picture.height, picture.width, target, how.crop_mode)
    top, left = round((height - spec.height) / 2), round((width - spec.width) / 2)
    resampling = _RESAMPLING[how.interpolation]
    if height * width > MOST_RESIZED_PIXELS and top >= 0 and left >= 0:
        down, across = picture.height / height, picture.width / width
        right, bottom = (left + spec.width) * across, (top + spec.height) * down
        box = (left * across, top * down, min(right, picture.width), min(bottom, picture.height))
        return _coloured(picture.resize((spec.width, spec.height), resampling, box), spec)
    resized = picture.resize((width, height), resampling)
    if top >= 0 and left >= 0:
        return _coloured(resized.crop((left, top, left + spec.width, top + spec.height)), spec)
    fill = tuple(round(255 * value) for value in how.mean)
    mode, colour = ("RGB", fill) if spec.channels == 3 else ("L", fill[0])
    canvas = Image.new(mode, (spec.width, spec.height), colour)
    canvas.paste(_coloured(resized, spec), (-left, -top))
    return canvas


def _coloured(picture: Image.Image, spec: InputSpec) -> Image.Image:
    return picture.convert("RGB") if spec.channels == 3 and picture.mode == "L" else picture


def _resized(height: int, width: int, target: tuple[int, int], crop_mode: str) -> tuple[int, int]:
    """Return the size to resize to before the crop, ``(height, width)``, rounded as timm rounds it."""
    if crop_mode == "squash":
        return target
    if crop_mode == "center" and target[0] == target[1]:
        short = min(height, width)
        return (
            target[0] if height == short else int(target[0] * height / short),
            target[1] if width == short else int(target[1] * width / short),
        )
    ratios = (height / target[0], width / target[1])
    ratio = max(ratios) if crop_mode == "border" else min(ratios)
    return max(1, round(height / ratio)), max(1, round(width / ratio))
