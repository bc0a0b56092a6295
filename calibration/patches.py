"""What a node multiplies with its weight, as rows of a matrix product: sampled patches of a map, or tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor

from deploykit.arrays import Array, FloatArray
from deploykit.errors import CalibrationError


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """A convolution or matrix product over a constant weight, as ``groups`` products ``(rows, K) @ (K, channels)``.

    ``shape`` is the weight's, ``axis`` that of its output channels; strides, pads and dilations are
    ONNX's, None for a matrix product.
    """

    shape: tuple[int, ...]
    axis: int
    groups: int = 1
    strides: tuple[int, int] | None = None
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilations: tuple[int, int] = (1, 1)

    @classmethod
    def of(cls, node: ir.Node, shape: tuple[int, ...], axis: int) -> LayerShape:
        """Return the shape of a Conv, Gemm or MatMul of a master graph.

        Raises:
            CalibrationError: a convolution that is not over images, or whose padding is not written out.
        """
        if node.op_type != "Conv":
            return cls(shape=shape, axis=axis)
        found = node.attributes
        auto_pad = found.get_string("auto_pad", "NOTSET")
        if len(shape) != 4 or auto_pad != "NOTSET":
            raise CalibrationError(
                f"{node.name} is a convolution over {len(shape) - 2} axes with auto_pad "
                f"{auto_pad}; expected 2 axes and padding that is written out. "
                "Keep rounding='nearest', weight_scales='max' and bias_correction='fast'."
            )
        top, left, bottom, right = found.get_ints("pads", (0, 0, 0, 0))
        return cls(
            shape=shape,
            axis=axis,
            groups=found.get_int("group", 1),
            strides=_pair(found.get_ints("strides", (1, 1))),
            pads=(top, left, bottom, right),
            dilations=_pair(found.get_ints("dilations", (1, 1))),
        )

    @property
    def row_size(self) -> int:
        """How many numbers a row of all groups holds."""
        channels = self.shape[self.axis]
        return int(np.prod(self.shape)) // channels * self.groups

    def matrix(self, weight: Array) -> Tensor:
        """Return the weight as ``(groups, channels, K)``."""
        turned = weight if self.axis == 0 else weight.T
        return torch.from_numpy(turned.copy().reshape(self.groups, turned.shape[0] // self.groups, -1))

    def restore(self, matrix: Tensor) -> FloatArray:
        """Return ``(groups, channels, K)`` in the weight's own shape."""
        rows = matrix.reshape(self.shape[self.axis], -1).numpy()
        return np.ascontiguousarray(rows.reshape(self.shape) if self.axis == 0 else rows.T)

    def rows(self, read: FloatArray, count: int, seed: int) -> FloatArray:
        """At most ``count`` rows ``(rows, groups, K)`` of what the node reads, drawn without replacement.

        Args:
            read: ``(N, C, H, W)``, or ``(..., K)`` for a matrix product.
            count: how many.
            seed: equal seeds draw equal positions.
        """
        if self.strides is None:
            tokens = read.reshape(-1, 1, read.shape[-1])
            return np.ascontiguousarray(tokens[_drawn(len(tokens), count, seed)])
        top, left, bottom, right = self.pads
        padded = np.pad(read, ((0, 0), (0, 0), (top, bottom), (left, right))).transpose(0, 2, 3, 1)
        sizes = [
            (padded.shape[1 + side] - self.dilations[side] * (self.shape[2 + side] - 1) - 1) // self.strides[side] + 1
            for side in (0, 1)
        ]
        drawn = _drawn(len(read) * sizes[0] * sizes[1], count, seed)
        image, position = np.divmod(drawn, sizes[0] * sizes[1])
        row, column = np.divmod(position, sizes[1])
        taps = [
            padded[
                image,
                row * self.strides[0] + down * self.dilations[0],
                column * self.strides[1] + across * self.dilations[1],
            ]
            for down in range(self.shape[2])
            for across in range(self.shape[3])
        ]
        return np.stack(taps, axis=2).reshape(len(drawn), self.groups, -1)


def _drawn(total: int, count: int, seed: int) -> npt.NDArray[np.int64]:
    if total <= count:
        return np.arange(total)
    return np.sort(np.random.default_rng(seed).choice(total, count, replace=False))


def _pair(values: Sequence[int]) -> tuple[int, int]:
    first, second = values
    return first, second
