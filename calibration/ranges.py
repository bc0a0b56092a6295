"""Streaming statistics of activations, and the range that each calibrator picks from them.

Memory is constant in the number of images: a tensor keeps its exact minimum and maximum and a
histogram, whose bins double in width whenever a value falls outside.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from deploykit.arrays import Array, FloatArray
from deploykit.calibration.counting import BINS, CountedBatch, read_values, widened
from deploykit.errors import CalibrationError
from deploykit.parity.report import MAX_SQNR_DB
from deploykit.spec import Int8

STATISTICS_VERSION = 3
"""Part of the keys of cached plans and engines: raise it where equal images give other statistics."""
_FACTS = 6
"""How many numbers a histogram's state holds before its counts."""
ENTROPY_LEVELS = 128
"""What TensorRT's calibrator rounds magnitudes to: 8 bits less the sign."""
ENTROPY_STEP = 8
"""Every how many bins a range is tried: under a hundredth of the largest."""

Doubles: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class ActivationRange:
    """What a tensor's quantization covers: ``low <= 0 <= high`` when affine, ``-amax..amax`` when symmetric."""

    low: float
    high: float
    amax: float

    def affine(self) -> tuple[float, int]:
        """Scale and zero point for uint8: ``x = (q - zero_point) * scale``."""
        scale = max(self.high - self.low, 1e-8) / 255
        return scale, int(np.clip(round(-self.low / scale), 0, 255))

    def symmetric(self) -> float:
        """Scale for int8 with zero point 0 and ``q`` in -127..127."""
        return max(self.amax, 1e-8) / 127


@dataclass(frozen=True, kw_only=True)
class TensorStatistics:
    """What calibration saw of one tensor: exact ends, estimated mean and standard deviation of all its values.

    ``sqnr_db`` is the signal over the noise that rounding to the chosen uint8 range makes, in dB.
    """

    low: float
    high: float
    mean: float
    deviation: float
    sqnr_db: float


class Histogram:
    """The distribution of one tensor, fed a batch at a time."""

    def __init__(self) -> None:
        self.low = np.inf
        self.high = -np.inf
        self._edge = 0.0  # the bins cover -edge..edge
        self._counts = np.zeros(BINS, np.float64)
        self._seen = 0  # values, sampled or not
        self._sum = 0.0
        self._squares = 0.0

    def state(self) -> Doubles:
        """Return all that it holds, exactly, as one vector: the number of values stays below 2**53."""
        facts = (self.low, self.high, self._edge, self._seen, self._sum, self._squares)
        return np.concatenate([np.array(facts, np.float64), self._counts])

    @classmethod
    def of(cls, state: Array) -> Histogram:
        """Return the histogram whose `state` this is.

        Raises:
            ValueError: it is none's.
        """
        if state.shape != (_FACTS + BINS,) or state.dtype != np.float64:
            raise ValueError(f"a histogram's state is {state.shape} {state.dtype}, not ({_FACTS + BINS},) float64")
        histogram = cls()
        histogram.low, histogram.high, histogram._edge = (float(value) for value in state[:3])
        histogram._seen, histogram._sum, histogram._squares = int(state[3]), float(state[4]), float(state[5])
        histogram._counts = state[_FACTS:].astype(np.float64)
        return histogram

    def update(self, values: Array) -> None:
        """Add one batch of the tensor, of any shape and layout; images along its first axis, if it has any.

        Raises:
            CalibrationError: no values, or NaN or infinity among them.
        """
        read = read_values(values, first=self._seen)
        self.add(read.counted(widened(self._edge, read.low, read.high)))

    def add(self, batch: CountedBatch) -> None:
        """Add a batch that was counted with this histogram's edge, widened for it, and its number of values before."""
        self.low, self.high = min(self.low, batch.low), max(self.high, batch.high)
        self._widen(batch.low, batch.high)
        for part in batch.parts:
            self._sum += part.weight * part.total
            self._squares += part.weight * part.squares
            if self._edge > 0:
                self._counts += part.weight * part.bins
        self._seen += batch.size

    def _widen(self, low: float, high: float) -> None:
        edge = widened(self._edge, low, high)
        while 0.0 < self._edge < edge:
            middle = self._counts.reshape(-1, 2).sum(1)
            self._counts = np.pad(middle, BINS // 4)
            self._edge *= 2
        self._edge = edge

    def statistics(self, chosen: ActivationRange) -> TensorStatistics:
        """Return what was seen, and how well a range rounds it."""
        mean = self._sum / self._seen
        used = np.flatnonzero(self._counts)
        signal = self._squares / self._seen
        noise = 0.0
        if len(used):
            counts = self._counts[used]
            noise = _error(self._centres()[used], counts, chosen.low, chosen.high, levels=255) / counts.sum()
        sqnr = 10 * np.log10(signal / noise) if signal > 0 and noise > 0 else MAX_SQNR_DB
        return TensorStatistics(
            low=self.low,
            high=self.high,
            mean=mean,
            deviation=float(np.sqrt(max(signal - mean * mean, 0.0))),
            sqnr_db=round(float(sqnr), 2),
        )

    def _centres(self) -> Doubles:
        """Return the middle of each bin."""
        return np.linspace(-self._edge, self._edge, BINS + 1)[:-1] + self._edge / BINS

    def choose(self, settings: Int8) -> ActivationRange:
        """Return the range that a calibrator picks; it always holds 0, so that padding is exact."""
        if not np.isfinite(self.low):
            raise CalibrationError("no batch was seen, so there is no range. Give at least one image.")
        low, high = min(self.low, 0.0), max(self.high, 0.0)
        if settings.calibrator == "minmax" or self._edge == 0.0:
            return ActivationRange(low=low, high=high, amax=max(-low, high))
        if settings.calibrator == "percentile":
            low, high = self._percentile(low, high, settings.percentile)
            return ActivationRange(low=low, high=high, amax=max(-low, high))
        if settings.calibrator == "entropy":
            amax = min(self._least_divergence(), max(-low, high))
            return ActivationRange(low=max(low, -amax), high=min(high, amax), amax=amax)
        amax = self._least_error(-max(-low, high), max(-low, high), levels=254)[1]
        low, high = self._least_error(low, high, levels=255)
        return ActivationRange(low=low, high=high, amax=amax)

    def _percentile(self, low: float, high: float, percent: float) -> tuple[float, float]:
        share = np.cumsum(self._counts)
        share /= share[-1]
        edges = np.linspace(-self._edge, self._edge, BINS + 1)
        tail = (1 - percent / 100) / (2 if low < 0 < high else 1)
        lower = edges[np.searchsorted(share, tail, side="right")] if low < 0 else 0.0
        upper = edges[np.searchsorted(share, 1 - tail) + 1] if high > 0 else 0.0
        return max(low, min(float(lower), 0.0)), min(high, max(float(upper), 0.0))

    def _least_divergence(self) -> float:
        """Return the magnitude to clip at, with the least divergence between the histogram and its rounding.

        After Migacz 2017, "8-bit Inference with TensorRT", over the histogram of magnitudes. The bin
        at 0 counts as much as its neighbour: every rounding keeps the zeros that a ReLU leaves.
        """
        counts = self._counts[BINS // 2 :] + self._counts[: BINS // 2][::-1]
        counts[0] = counts[1]
        if not counts.any():
            return self._edge
        sizes = range(ENTROPY_LEVELS, len(counts) + 1, ENTROPY_STEP)
        best = min(sizes, key=lambda size: _divergence(counts, size))
        return best * self._edge / len(counts)

    def _least_error(self, low: float, high: float, *, levels: int) -> tuple[float, float]:
        """Shrink each end in turn to the least mean squared error of quantizing the histogram."""
        used = np.flatnonzero(self._counts)
        centres = self._centres()[used]
        counts = self._counts[used]
        shares = np.linspace(0.3, 1.0, 71)
        if low == -high:
            best = min(shares, key=lambda share: _error(centres, counts, low * share, high * share, levels))
            return float(low * best), float(high * best)
        best = min(shares, key=lambda share: _error(centres, counts, low, high * share, levels))
        high *= best
        if low < 0:
            best = min(shares, key=lambda share: _error(centres, counts, low * share, high, levels))
            low *= best
        return float(low), float(high)


def _error(centres: Doubles, counts: Doubles, low: float, high: float, levels: int) -> float:
    scale = max(high - low, 1e-12) / levels
    offset = round(-low / scale)
    rounded = (np.clip(np.round(centres / scale) + offset, 0, levels) - offset) * scale
    return float(np.sum(counts * (rounded - centres) ** 2))


def _divergence(counts: Doubles, size: int) -> float:
    """KL divergence of the first ``size`` bins, with all beyond in the last, from their rounding to levels."""
    inside = counts[:size]
    reference = inside.copy()
    reference[-1] += counts[size:].sum()
    starts = np.arange(ENTROPY_LEVELS) * size // ENTROPY_LEVELS
    used = inside > 0
    shared = np.maximum(np.add.reduceat(used.astype(np.float64), starts), 1)
    level = np.repeat(np.add.reduceat(inside, starts) / shared, np.diff(starts, append=size))
    rounded = np.where(used, level, 0.0)
    if not rounded.any():
        return np.inf
    reference, rounded = reference / reference.sum(), rounded / rounded.sum()
    some = reference > 0
    return float(np.sum(reference[some] * np.log(reference[some] / np.maximum(rounded[some], 1e-12))))


def quantize_weight(
    weight: FloatArray, axis: int, least: FloatArray | None = None, *, reduce_range: bool = False
) -> tuple[npt.NDArray[np.int8], FloatArray]:
    """Return a weight to int8 in -127..127 with one scale a channel of ``axis``, and those scales.

    ``least`` is the smallest scale that each channel may have, ``(channels,)``. With ``reduce_range`` no two
    weights of one sign in a channel add up to more than 128: 255 times that fits 16 bits, where x86
    processors without VNNI add pairs of products. Weights of 7 bits would do too, and lose more.

    A channel that BatchNorm folding left at zero, or far below the others, gets a scale of a
    ten-thousandth of the largest: a scale of zero would give NaN.
    """
    moved = np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1).astype(np.float64)
    amax = np.abs(moved).max(axis=1)
    floor = max(float(amax.max()) * 1e-4, 1e-8)
    reach = np.maximum(_largest_pairs(moved), amax) if reduce_range else amax
    scales = np.maximum(np.maximum(reach, floor) / 127, 0.0 if least is None else least).astype(np.float32)
    shape = [1] * weight.ndim
    shape[axis] = -1
    rounded = np.round(weight / scales.reshape(shape))
    return np.clip(rounded, -127, 127).astype(np.int8), scales


def _largest_pairs(channels: Doubles) -> Doubles:
    """Return the largest sum of two values of one sign in each row, ``(rows,)``; of the one value in rows of one."""
    sums = [np.sort(np.maximum(one_sign, 0), axis=1)[:, -2:].sum(axis=1) for one_sign in (channels, -channels)]
    return np.asarray(np.maximum(*sums))
