"""Rounding a weight so that the error of one element makes up for that of those before it.

The error that rounding leaves in a layer's output is ``tr(E H E')`` with ``E = Wq - W`` and the second
moments ``H = E[x x']`` of what the layer reads. Its columns are rounded one after another, and what each
leaves is carried over to the columns that are still float (GPTQ, Frantar et al. 2022, after OBQ); then
single elements move by a step while that lowers the error (coordinate descent, as in QuantEase, Behdin et
al. 2023). Like AdaRound (Nagel et al. 2020) it needs nothing but calibration images; nothing is learned by
gradient descent, so equal images give equal integers.
"""

from __future__ import annotations

import torch
from torch import Tensor

DAMPING = 0.01
"""Added to the diagonal of the second moments, as a share of its mean: directions that the images never take."""
BLOCK = 128
SWEEPS = 2
CLIPPINGS = tuple(1 - step / 40 for step in range(21))
"""The shares of a channel's largest weight that a scale may end at: 1 to 0.5."""


def round_with_feedback(weight: Tensor, scales: Tensor, moments: Tensor, top: int = 127) -> Tensor:
    """Return Integers whose products with what a layer reads are close to the weight's.

    Args:
        weight: ``(groups, channels, K)`` in float, the weights of each group's output channels.
        scales: ``(groups, channels)``, the step of each output channel.
        moments: ``(groups, K, K)``, the second moments of what each group reads.
        top: the largest integer.

    Returns:
        ``(groups, channels, K)`` in -top..top, float.
    """
    damped = moments + _damping(moments)
    size = damped.shape[1]
    order = torch.argsort(torch.diagonal(damped, dim1=1, dim2=2), dim=1, descending=True)  # the loudest first
    damped = damped.gather(1, order[:, :, None].expand(-1, -1, size)).gather(2, order[:, None].expand(-1, size, -1))
    columns = order[:, None].expand_as(weight)
    target = (weight / scales.unsqueeze(2)).gather(2, columns)
    rounded = _with_feedback(target, damped, top)
    _descend(rounded, target, damped, top)
    return torch.empty_like(rounded).scatter_(2, columns, rounded)


def round_to_nearest(weight: Tensor, scales: Tensor, top: int = 127) -> Tensor:
    """Integers in -top..top, as float, of a weight ``(groups, channels, K)`` with scales ``(groups, channels)``."""
    return (weight / scales.unsqueeze(2)).round().clamp(-top, top)


def clipped_scales(weight: Tensor, scales: Tensor, moments: Tensor, top: int = 127) -> Tensor:
    """The scales, each at most as it was, with the least squared error in the output after rounding to the nearest.

    Args:
        weight: ``(groups, channels, K)``.
        scales: ``(groups, channels)`` that clip nothing.
        moments: ``(groups, K, K)``, the second moments of what each group reads.
        top: the largest integer.
    """
    best, least = scales.clone(), torch.full_like(scales, torch.inf)
    for share in CLIPPINGS:
        tried = scales * share
        error = round_to_nearest(weight, tried, top) * tried.unsqueeze(2) - weight
        loss = ((error @ moments) * error).sum(2)
        best, least = torch.where(loss < least, tried, best), torch.minimum(loss, least)
    return best


def _damping(moments: Tensor) -> Tensor:
    mean = torch.diagonal(moments, dim1=1, dim2=2).mean(1).clamp_min(1e-12)
    return torch.diag_embed((DAMPING * mean)[:, None].expand(moments.shape[:2]))


def _with_feedback(target: Tensor, moments: Tensor, top: int) -> Tensor:
    """Round column by column; what is left of each is spread over those after it by the inverse moments."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments))
    factor = torch.linalg.cholesky(inverse, upper=True)
    left, rounded, size = target.clone(), torch.empty_like(target), target.shape[2]
    for start in range(0, size, BLOCK):
        stop = min(start + BLOCK, size)
        errors = torch.empty_like(left[:, :, start:stop])
        for column in range(start, stop):
            rounded[:, :, column] = left[:, :, column].round().clamp(-top, top)
            error = (left[:, :, column] - rounded[:, :, column]) / factor[:, column, column, None]
            left[:, :, column:stop] -= error[:, :, None] * factor[:, column, None, column:stop]
            errors[:, :, column - start] = error
        left[:, :, stop:] -= errors @ factor[:, start:stop, stop:]
    return rounded


def _descend(rounded: Tensor, target: Tensor, moments: Tensor, top: int) -> None:
    """Move single elements by whole steps, in place, while that lowers the error of the output."""
    gradient = (rounded - target) @ moments
    diagonal = torch.diagonal(moments, dim1=1, dim2=2)
    size = target.shape[2]
    for _ in range(SWEEPS):
        moved = False
        for start in range(0, size, BLOCK):
            stop = min(start + BLOCK, size)
            steps = torch.zeros_like(rounded[:, :, start:stop])
            near = moments[:, start:stop, start:stop]
            slope = gradient[:, :, start:stop].clone()
            for column in range(stop - start):
                here = rounded[:, :, start + column]
                best = here - slope[:, :, column] / diagonal[:, start + column, None]
                step = best.round().clamp(-top, top) - here
                steps[:, :, column] = step
                here += step
                slope += step[:, :, None] * near[:, None, column]
            if steps.any():
                moved = True
                gradient += steps @ moments[:, start:stop]
        if not moved:
            break
