"""What a histogram takes of one batch of a tensor, read from memory once: its ends, and values counted into bins.

A large tensor's outer values are all counted, and its inner ones by a sample that favours no row, column, channel or
token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from deploykit.arrays import Array
from deploykit.errors import CalibrationError
from deploykit.sampling import sample_positions

BINS = 2048
SAMPLES_PER_IMAGE = 16384
MOST_SAMPLES = 2**20
"""How many values of one batch are sampled at most: the first axis may be tokens or windows, and not images."""
TAIL_SHARE = 128
"""One of so many sampled values lies beyond each of the two limits outside which every value is counted."""
CHUNK = 2**16
"""How many values are looked at together: few enough to stay in a core's cache until the last look."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CountedValues:
    """Some values of a batch, each of which stands for ``weight`` values of its tensor: their sums, and their bins.

    ``bins`` is ``(BINS,)``, whole numbers; all 0 for a tensor of zeros.
    """

    weight: float
    total: float
    squares: float
    bins: npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class CountedBatch:
    """What a histogram takes of one batch: the ends and the number of all its values, and those that were counted."""

    low: float
    high: float
    size: int
    parts: tuple[CountedValues, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class ReadValues:
    """One batch of a tensor: its ends, and the values to count, in groups that each stand for ``weight`` values."""

    low: float
    high: float
    size: int
    groups: tuple[tuple[float, Array], ...]

    def counted(self, edge: float) -> CountedBatch:
        """Count into bins over ``-edge..edge``, the edge of the histogram that takes it, widened for it."""
        parts = tuple(_counted(values, weight, edge) for weight, values in self.groups)
        return CountedBatch(low=self.low, high=self.high, size=self.size, parts=parts)


def read_values(values: Array, *, first: int) -> ReadValues:
    """Read one batch of a tensor.

    A corner or a class token is too few values for a sample to count, and may be what a range depends on: every value
    beyond the sample's outermost ones is kept.

    Args:
        values: of any shape and layout; images along the first axis, if there is any.
        first: how many values came before, which gives other positions of the sample in each batch.

    Raises:
        CalibrationError: no values, or NaN or infinity among them.
    """
    flat = values.reshape(-1)
    count = min(SAMPLES_PER_IMAGE * (len(values) if values.ndim else 1), MOST_SAMPLES)
    if flat.size < max(2 * count, 1):
        low, high = extremes(values)
        return ReadValues(low=low, high=high, size=flat.size, groups=((1.0, flat),))
    sample = np.sort(flat.take(sample_positions(flat.size, count, first=first)))
    least, greatest = sample[count // TAIL_SHARE], sample[-1 - count // TAIL_SHARE]
    beyond_end = np.empty(CHUNK, bool)  # new ones for each chunk would cost as much as the look itself
    ends, outer = [], []
    for chunk in _chunks(flat):
        low, high = chunk.min(), chunk.max()
        ends.append((low, high))
        if low < least:
            outer.append(chunk[np.less(chunk, least, out=beyond_end[: chunk.size])])
        if high > greatest:
            outer.append(chunk[np.greater(chunk, greatest, out=beyond_end[: chunk.size])])
    low, high = _whole(ends, values)
    tails = np.concatenate(outer) if outer else flat[:0]
    inner = sample[np.searchsorted(sample, least) : np.searchsorted(sample, greatest, side="right")]
    groups = ((1.0, tails), ((flat.size - tails.size) / inner.size, inner))
    return ReadValues(low=low, high=high, size=flat.size, groups=groups)


def extremes(values: Array) -> tuple[float, float]:
    """Return the least and the greatest value of one batch of a tensor.

    Raises:
        CalibrationError: no values, or NaN or infinity among them.
    """
    return _whole([(chunk.min(), chunk.max()) for chunk in _chunks(values.reshape(-1))], values)


def widened(edge: float, low: float, high: float) -> float:
    """Return the edge of a histogram after a batch from ``low`` to ``high``: the first one's magnitude, doubled."""
    magnitude = max(abs(low), abs(high))
    if edge == 0.0:
        return magnitude
    while edge < magnitude:
        edge *= 2
    return edge


def _chunks(flat: Array) -> Iterator[Array]:
    for start in range(0, flat.size, CHUNK):
        yield flat[start : start + CHUNK]


def _whole(ends: list[tuple[float, float]], values: Array) -> tuple[float, float]:
    """Return the ends of a tensor from those of its chunks.

    Raises:
        CalibrationError: no values, or NaN or infinity among them.
    """
    if not ends:
        raise CalibrationError(f"an activation has shape {values.shape}, which holds no values. Check the images.")
    least, greatest = np.array(ends).T
    low, high = float(least.min()), float(greatest.max())
    if not np.isfinite(low) or not np.isfinite(high):
        raise CalibrationError("an activation is NaN or infinite in FP32. Check the images and the weights.")
    return low, high


def _counted(values: Array, weight: float, edge: float) -> CountedValues:
    samples = values.astype(np.float64)  # float32 has no 2048 bins below its least normal number
    total, squares = float(samples.sum()), float(np.square(samples).sum())
    counts = np.zeros(BINS, np.int64)
    if edge > 0:
        samples += edge
        samples *= BINS / 2 / edge
        counts = np.bincount(np.minimum(samples.astype(np.int64), BINS - 1), minlength=BINS)
    return CountedValues(weight=weight, total=total, squares=squares, bins=counts)
