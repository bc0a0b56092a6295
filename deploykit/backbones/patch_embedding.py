"""From an image to tokens, and how trained patch and position embeddings fit another patch or image size."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deploykit.errors import SpecError


class PatchEmbed(nn.Module):
    """One token a patch: ``(N, C, H, W)`` to ``(N, H/patch * W/patch, dim)``, row by row.

    ``grid`` is the number of patches in (height, width), ``stride`` the side of a patch in pixels.

    Raises:
        SpecError: a side of the image is not a multiple of the patch.
    """

    def __init__(self, image_size: tuple[int, int], patch: int, in_channels: int, dim: int) -> None:
        super().__init__()
        if any(side % patch for side in image_size):
            near = tuple(max(1, round(side / patch)) * patch for side in image_size)
            raise SpecError(
                f"image_size is {image_size} and the patch is {patch} pixels; each side must be a multiple of it. "
                f"The nearest such image_size is {near}."
            )
        self.stride = patch
        self.grid = (image_size[0] // patch, image_size[1] // patch)
        self.proj = nn.Conv2d(in_channels, dim, patch, stride=patch)

    def forward(self, images: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to ``(N, T, dim)``."""
        output: Tensor = self.proj(images).flatten(2).transpose(1, 2)
        return output


def resample_patch_weight(weight: Tensor, patch: tuple[int, int]) -> Tensor:
    """Return a patch projection ``(dim, C, h, w)`` for patches of another size, ``(dim, C, *patch)``.

    FlexiViT's PI-resize (Beyer et al. 2023, section 3.4): the pseudo-inverse of the bicubic resize,
    so that a resized patch gives the token that the patch gave.
    """
    height, width = weight.shape[2], weight.shape[3]
    if (height, width) == patch:
        return weight
    basis = torch.eye(height * width).reshape(height * width, 1, height, width)
    resized = F.interpolate(basis, size=patch, mode="bicubic", antialias=True, align_corners=False)
    inverse = torch.linalg.pinv(resized.flatten(1).T)
    flat = weight.detach().float().cpu().flatten(2) @ inverse
    resampled: Tensor = flat.reshape(*weight.shape[:2], *patch).to(weight)
    return resampled


def resample_position_embedding(
    embedding: Tensor, source: tuple[int, int], target: tuple[int, int], *, prefix: int
) -> Tensor:
    """Position embeddings ``(1, prefix + h * w, dim)`` of one grid, for another: bicubic, antialiased.

    The first ``prefix`` rows (class token, registers) stand for no place and stay.
    """
    if source == target:
        return embedding
    places = embedding[:, prefix:].detach().float().reshape(1, *source, embedding.shape[2]).permute(0, 3, 1, 2)
    resized = F.interpolate(places, size=target, mode="bicubic", antialias=True)
    return torch.cat([embedding[:, :prefix], resized.flatten(2).transpose(1, 2).to(embedding)], dim=1)


def source_grid(tokens: int, *, native: tuple[int, int] | None, target: tuple[int, int]) -> tuple[int, int] | None:
    """Return the grid that a checkpoint's ``tokens`` position embeddings stand on, or None if it can't be told.

    As in timm: the variant's native grid where the count fits it, else the module's own grid, else a
    square. A checkpoint saved on a rectangular grid with the native count is thus read as native.
    """
    if native is not None and native[0] * native[1] == tokens:
        return native
    if target[0] * target[1] == tokens:
        return target
    side = math.isqrt(tokens)
    return (side, side) if side * side == tokens else None
