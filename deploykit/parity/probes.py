"""Images made from others: what an engine is asked beside the images that a bundle carries."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

ImageArray = npt.NDArray[np.float32 | np.uint8]

ROUNDING = 1e-5
"""The size of a change that only moves roundings, relative to the largest value."""

NOISE = 0.02
"""The size of a change that every network answers, relative to the standard deviation."""

_CHANGED_PIXELS = 1e-3
_NOISE_STEPS = 3


def mixed_images(images: ImageArray, count: int) -> ImageArray:
    """Mix the first images, each with the mirrored next one, half and half.

    Args:
        images: ``(N, C, H, W)`` float32, or ``(N, H, W, C)`` uint8.
        count: how many to make, at most N.
    """
    chosen = np.arange(min(count, len(images)))
    others = _mirrored(images[(chosen + 1) % len(images)])
    if images.dtype == np.uint8:
        return ((images[chosen].astype(np.uint16) + others) // 2).astype(np.uint8)
    return ((images[chosen] + others) / 2).astype(images.dtype)


def nudged_images(images: ImageArray, seed: int) -> ImageArray:
    """Change images by so little that only roundings inside an engine move; equal seeds give equal changes."""
    generator = np.random.default_rng(seed)
    if images.dtype == np.uint8:
        steps = np.where(generator.random(images.shape) < _CHANGED_PIXELS, 1, 0)
        nudged: ImageArray = np.where(images < 255, images + steps, images - steps).astype(np.uint8)
        return nudged
    return _with_noise(images, ROUNDING * float(np.abs(images).max()), generator)


def noisy_images(images: ImageArray, generator: np.random.Generator) -> ImageArray:
    """Add noise that a person does not see and every network answers."""
    if images.dtype == np.uint8:
        steps = generator.integers(-_NOISE_STEPS, _NOISE_STEPS + 1, images.shape)
        noisy: ImageArray = np.clip(images.astype(np.int16) + steps, 0, 255).astype(np.uint8)
        return noisy
    return _with_noise(images, NOISE * float(images.std()), generator)


def _with_noise(images: ImageArray, size: float, generator: np.random.Generator) -> ImageArray:
    noise = generator.standard_normal(images.shape, dtype=np.float32)
    noisy: ImageArray = (images + size * noise).astype(images.dtype)
    return noisy


def _mirrored(images: ImageArray) -> ImageArray:
    return images[:, :, ::-1] if images.dtype == np.uint8 else images[..., ::-1]
