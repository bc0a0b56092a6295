"""Relative positions of the places of a map: which row of a bias table a pair reads, and tables for other sizes."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def pair_index(size: tuple[int, int]) -> Tensor:
    """For each pair of places of a ``(height, width)`` map its row in the table; ``(H*W * H*W,)`` int64."""
    height, width = size
    rows, columns = torch.arange(height).repeat_interleave(width), torch.arange(width).repeat(height)
    down = rows[:, None] - rows + height - 1
    across = columns[:, None] - columns + width - 1
    return (down * (2 * width - 1) + across).flatten()


def resize_table(table: Tensor, size: tuple[int, int]) -> Tensor:
    """Return a table ``(rows, heads)`` that was trained on a square map, for a map of another ``(height, width)``.

    As BEiT and timm do: the trained distances are spread by a geometric progression, denser near 0,
    and values between them are linear. A table of rows that fit no square stays as it is.
    """
    side = math.isqrt(table.shape[0])
    target = (2 * size[0] - 1, 2 * size[1] - 1)
    if side * side != table.shape[0] or (side, side) == target:
        return table
    square = table.detach().float().reshape(side, side, -1)
    down, across = _resize_matrix(side, target[0]), _resize_matrix(side, target[1])
    resized = torch.einsum("ys,xt,sth->yxh", down, across, square)
    return resized.reshape(target[0] * target[1], -1).to(table)


def _resize_matrix(source: int, target: int) -> Tensor:
    """Return ``(target, source)``: linear interpolation from geometrically spaced distances to whole ones."""
    positions = torch.tensor(_distances(source, target))
    wanted = torch.arange(-(target // 2), target // 2 + 1, dtype=torch.float32)
    right = torch.searchsorted(positions, wanted).clamp(1, source - 1)
    low, high = positions[right - 1], positions[right]
    share = ((wanted - low) / (high - low)).clamp(0.0, 1.0)
    matrix = torch.zeros(target, source)
    places = torch.arange(target)
    matrix[places, right - 1] = 1.0 - share
    matrix[places, right] = share
    return matrix


def _distances(source: int, target: int) -> list[float]:
    """``source`` positions, symmetric about 0, whose steps grow by a ratio so that the ends reach the target's."""
    count = source // 2
    low, high = 1.01, 1.5
    ratio = low
    while high - low > 1e-6:
        ratio = (low + high) / 2.0
        if (1.0 - ratio**count) / (1.0 - ratio) > target // 2:
            high = ratio
        else:
            low = ratio
    distances, reach = [], 1.0
    for step in range(count):
        distances.append(reach)
        reach += ratio ** (step + 1)
    return [-distance for distance in reversed(distances)] + [0.0] + distances
