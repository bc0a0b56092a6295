"""How a weight was rounded where that is not to the nearest integer: what a plan keeps of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from deploykit.arrays import FloatArray
from deploykit.calibration.ranges import quantize_weight

Scalar = TypeVar("Scalar", bound=np.generic)


@dataclass(frozen=True, kw_only=True, eq=False)
class RoundedWeight:
    """The integers of a weight, as steps from the nearest ones: few and small, so that they compress.

    ``steps`` is int8 of the weight's shape; ``scales`` is ``(channels,)`` float32, what they are steps of.
    """

    steps: npt.NDArray[np.int8]
    scales: FloatArray

    @classmethod
    def of(cls, weight: FloatArray, axis: int, integers: npt.NDArray[np.int8], scales: FloatArray) -> RoundedWeight:
        """Return what brings ``integers`` back from the weight."""
        nearest = _nearest(weight, axis, scales)
        return cls(steps=(integers.astype(np.int16) - nearest).astype(np.int8), scales=scales)

    def integers_of(
        self,
        weight: FloatArray,
        axis: int,
        least: FloatArray | None = None,
        *,
        reduce_range: bool = False,
    ) -> tuple[npt.NDArray[np.int8], FloatArray]:
        """Return the integers and scales; a channel whose scale is below the ``least`` is rounded to the nearest."""
        integers = (_nearest(weight, axis, self.scales) + self.steps).astype(np.int8)
        if least is None or not np.any(self.scales < least):
            return integers, self.scales
        coarse, raised = quantize_weight(weight, axis, least, reduce_range=reduce_range)
        small = self.scales < least
        return np.where(_along(small, weight, axis), coarse, integers), np.where(small, raised, self.scales)


def _nearest(weight: FloatArray, axis: int, scales: FloatArray) -> npt.NDArray[np.int16]:
    rounded = np.clip(np.round(weight / _along(scales, weight, axis)), -127, 127)
    return np.asarray(rounded, np.int16)


def _along(channels: npt.NDArray[Scalar], weight: FloatArray, axis: int) -> npt.NDArray[Scalar]:
    shape = [1] * weight.ndim
    shape[axis] = -1
    return channels.reshape(shape)
