"""The mean of what a node multiplies with its weight, from which the mean of its output follows.

The mean over positions of ``conv(x, w)`` is ``w`` times the mean patch of ``x``, and that of ``x @ w`` is the mean row
of ``x`` times ``w``. So the mean error that rounding a weight makes needs no convolution with the weight's error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from deploykit.arrays import Array, FloatArray

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class PatchWindow:
    """How a convolution's kernel moves over the axes of a map; all are ONNX's, without its channels.

    ``pads`` are those of every axis's begin, then those of every axis's end.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]
    auto_pad: str = "NOTSET"

    @classmethod
    def of(cls, node: ir.Node, weight_shape: Sequence[int]) -> PatchWindow:
        """Return the window of a Conv whose weight has this shape, ``(O, I/groups, ...)``."""
        kernel, found = tuple(int(side) for side in weight_shape[2:]), node.attributes
        ones = (1,) * len(kernel)
        return cls(
            kernel=kernel,
            strides=tuple(found.get_ints("strides", ones)),
            dilations=tuple(found.get_ints("dilations", ones)),
            pads=tuple(found.get_ints("pads", (0,) * 2 * len(kernel))),
            auto_pad=found.get_string("auto_pad", "NOTSET"),
        )

    def mean(self, read: Array) -> Doubles:
        """Return the mean patch of a batch ``(N, C, ...)``, over images and positions: ``(C, *kernel)``.

        By sums and not by matrix products, whose threads would spin on beside those that run the network.
        """
        total = read.sum(axis=0, dtype=np.float32) if len(read) > 1 else read[0]
        if self._is_pointwise:
            means = total.reshape(len(total), -1).sum(axis=1, dtype=np.float32) / (read[:, 0].size)
            return np.asarray(means, np.float64).reshape(-1, *self.kernel)
        positions = len(read)
        for axis in range(len(self.kernel)):
            begin, count = self._place(axis, total.shape[1])
            starts = [tap * self.dilations[axis] - begin for tap in range(self.kernel[axis])]
            # What is done stands behind the axes that are not, so that the next one is always behind the channels.
            total = np.stack(_taps(total, starts, self.strides[axis], count), axis=-1)
            positions *= count
        return np.asarray(total, np.float64) / positions

    @property
    def _is_pointwise(self) -> bool:
        """Whether it reads each value of a map once: a 1x1 kernel that leaves none out, as most are."""
        return {*self.kernel, *self.strides} == {1} and not any(self.pads)

    def _place(self, axis: int, length: int) -> tuple[int, int]:
        """Return the padding before an axis, and how many positions the kernel takes along it."""
        reach = self.dilations[axis] * (self.kernel[axis] - 1) + 1
        stride = self.strides[axis]
        if self.auto_pad in ("SAME_UPPER", "SAME_LOWER"):
            count = -(-length // stride)
            padding = max((count - 1) * stride + reach - length, 0)
            return (padding + (self.auto_pad == "SAME_LOWER")) // 2, count
        begin, end = (0, 0) if self.auto_pad == "VALID" else (self.pads[axis], self.pads[axis + len(self.kernel)])
        return begin, (length + begin + end - reach) // stride + 1


def mean_row(read: Array) -> Doubles:
    """Return the mean of the rows ``(..., K)`` of a matrix product: ``(K,)``."""
    return np.asarray(read.reshape(-1, read.shape[-1]).mean(axis=0, dtype=np.float64))


def mean_output(node: ir.Node, weight: FloatArray, axis: int, patch: Array) -> npt.NDArray[np.float32]:
    """Return the mean of each output channel, ``(channels,)``, without the bias.

    Args:
        node: a Conv, Gemm or MatMul.
        weight: what it multiplies with, of the shape of its weight.
        axis: that of the weight's output channels.
        patch: the mean of what it reads: ``(C, *kernel)``, or ``(K,)`` for a product.
    """
    mean = np.asarray(patch, np.float64)
    if node.op_type == "Conv":
        groups = node.attributes.get_int("group", 1)
        rows = weight.reshape(groups, len(weight) // groups, -1).astype(np.float64)
        return np.asarray((rows @ mean.reshape(groups, -1, 1)).reshape(-1), np.float32)
    factor = node.attributes.get_float("alpha", 1.0) if node.op_type == "Gemm" else 1.0
    matrix = (weight if axis == 0 else weight.T).astype(np.float64)
    return np.asarray(factor * (matrix @ mean), np.float32)


def _taps(values: Array, starts: Sequence[int], stride: int, count: int) -> list[FloatArray]:
    """Sum ``count`` values along the axis behind the channels for each tap of a kernel, which begins at its start.

    With a stride of 1 a tap is the whole axis but for a few values at its ends: one sum serves all taps.
    """
    length = values.shape[1]
    if stride > 1 or any(2 * (min(start + count, length) - max(start, 0)) < length for start in starts):
        return [_every(values, start, stride, count) for start in starts]
    whole = _every(values, 0, 1, length)
    return [whole - _every(values, 0, 1, start) - _every(values, start + count, 1, length) for start in starts]


def _every(values: Array, start: int, stride: int, count: int) -> FloatArray:
    """Sum ``count`` values along the axis behind the channels, from ``start`` on, where they are inside the map."""
    first = max(-(start // stride), 0)
    inside = values[:, start + first * stride : max(start + (count - 1) * stride + 1, 0) : stride]
    return np.asarray(inside.sum(axis=1, dtype=np.float32))
