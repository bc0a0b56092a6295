"""AveragePool(x, ceil_mode=1, count_include_pad=1) -> Mul(AveragePool(Pad(x)), window / covered), in ONNX graphs.

Where rounding up lets the last window hang over the padded map, ONNX divides by the padded positions that the
window covers; OpenVINO 2026.4.1 divides by others.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from deploykit.fusion.data_movement import is_static, sizes
from deploykit.fusion.graph_writer import GraphWriter

_SETTINGS = {"kernel_shape": "kernel", "strides": "stride", "dilations": "dilation"}


def pad_average_pool(model: ir.Model) -> int:
    """Give each such pooling whole windows, and correct their divisors by a constant map, in place.

    Exact. Left alone: windows that end within the padded map, and sizes that are not static but for the batch.

    Returns:
        How many poolings were rewritten.
    """
    return sum(_rewrite(model, node) for node in list(model.graph) if node.op_type == "AveragePool")


@dataclass(frozen=True, kw_only=True)
class _Axis:
    """One spatial axis of a pooling: ``side`` positions in, ``windows`` out."""

    side: int
    windows: int
    kernel: int
    stride: int
    dilation: int
    begin: int
    end: int

    @property
    def padded(self) -> int:
        return self.side + self.begin + self.end

    @property
    def over(self) -> int:
        """Return by how many positions the last window hangs over the padded side."""
        last = (self.windows - 1) * self.stride + (self.kernel - 1) * self.dilation + 1
        return max(0, last - self.padded)

    def factors(self) -> npt.NDArray[np.float64]:
        """Return what turns a division by the kernel into one by each window's positions within the padded side."""
        starts = np.arange(self.windows)[:, None] * self.stride
        covered = (starts + np.arange(self.kernel) * self.dilation < self.padded).sum(1)
        return np.asarray(self.kernel / covered, np.float64)


def _rewrite(model: ir.Model, pool: ir.Node) -> bool:
    source, attributes = pool.inputs[0], pool.attributes
    if not attributes.get_int("ceil_mode", 0) or not attributes.get_int("count_include_pad", 0):
        return False
    if source is None or not is_static(source) or not is_static(pool.outputs[0]):
        return False
    axes = _axes(pool)
    if not any(axis.over for axis in axes):
        return False
    channels, *_ = sizes(source)
    graph = GraphWriter(model=model, before=pool, name=f"{pool.outputs[0].name}_pool")
    ends = [axis.end + axis.over for axis in axes]
    amounts = graph.constant(np.array([0, 0, *(axis.begin for axis in axes), 0, 0, *ends]), "pads")
    whole = tuple(axis.padded + axis.over for axis in axes)
    padded = graph.node("Pad", [source, amounts], (channels, *whole), "padded")
    settings = {name: [getattr(axis, field) for axis in axes] for name, field in _SETTINGS.items()}
    windows = tuple(axis.windows for axis in axes)
    mean = graph.node("AveragePool", [padded], (channels, *windows), "mean", settings)
    factors = np.ones(1)
    for axis in axes:
        factors = factors[..., None] * axis.factors()
    corrected = graph.constant(factors.astype(np.float32).reshape(1, 1, *windows), "factors")
    graph.finish(graph.node("Mul", [mean, corrected], (channels, *windows), "out"))
    return True


def _axes(pool: ir.Node) -> list[_Axis]:
    """Return the spatial axes of a pooling with explicit pads; none where it pads by a rule."""
    if pool.attributes.get_string("auto_pad", "NOTSET") != "NOTSET":
        return []
    kernel = list(pool.attributes.get_ints("kernel_shape", ()))
    count = len(kernel)
    strides = pool.attributes.get_ints("strides", [1] * count)
    dilations = pool.attributes.get_ints("dilations", [1] * count)
    pads = pool.attributes.get_ints("pads", [0] * 2 * count)
    sides, windows = sizes(pool.inputs[0])[1:], sizes(pool.outputs[0])[1:]
    return [
        _Axis(
            side=sides[axis],
            windows=windows[axis],
            kernel=kernel[axis],
            stride=strides[axis],
            dilation=dilations[axis],
            begin=pads[axis],
            end=pads[count + axis],
        )
        for axis in range(count)
    ]
