"""The master graph as calibration runs it: each tensor that needs a range is an output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from deploykit.arrays import Array, FloatArray
from deploykit.calibration.mean_patches import PatchWindow, mean_output, mean_row
from deploykit.calibration.placement import Placement, place
from deploykit.calibration.ranges import quantize_weight
from deploykit.calibration.statistics import Statistics
from deploykit.errors import CalibrationError
from deploykit.onnx_session import onnx_session
from deploykit.onnx_values import array_of, floats_of
from deploykit.spec import Int8


class Instrumented:
    """A master graph that gives what statistics are made of.

    Args:
        model: the FP32 master graph.
        settings: filled: whether biases are corrected, and whether weights are rounded more coarsely.

    Raises:
        CalibrationError: nothing in the graph can be quantized.
        MissingDependency: onnxruntime, which runs the graph, is not installed.
    """

    def __init__(self, model: ir.Model, settings: Int8) -> None:
        self.placement = place(model)
        if not self.placement.weights:
            raise CalibrationError("the graph has no convolution or matrix product with constant weights to quantize.")
        self._bias = BiasProbes(model, self.placement, settings) if settings.bias_correction else None
        read = self._bias.tensors if self._bias else ()
        self._source = str(model.graph.inputs[0].name)
        every = dict.fromkeys((*self.placement.tensors, *read))
        self._wanted = [name for name in every if name != self._source]
        self._run = onnx_session(_with_outputs(model, self._wanted)).repeated(self._wanted)

    def observe(self, batch: FloatArray) -> tuple[dict[str, Array], dict[str, Array]]:
        """Run one batch, ``(N, C, H, W)``; return the tensors that need a range, and the probes, by name.

        The next batch is written over them.
        """
        feeds = {self._source: batch}
        inner = self._run(feeds) if self._wanted else []  # of no names it would run all
        found = dict(zip(self._wanted, inner, strict=True)) | feeds
        probes = self._bias.measure(found) if self._bias else {}
        return {name: found[name] for name in self.placement.tensors}, probes

    def bias_shifts(self, statistics: Statistics) -> dict[str, npt.NDArray[np.float32]]:
        """Return the mean error that rounding each node's weight makes in its output, ``(channels,)``, by node."""
        return self._bias.shifts(statistics) if self._bias else {}


class BiasProbes:
    """The mean of what each integer node reads, and what the rounding error of its weight makes of it.

    Nodes that read one tensor in one way share a probe.
    """

    def __init__(self, model: ir.Model, placement: Placement, settings: Int8) -> None:
        self._nodes = {str(node.name): node for node in model.graph if node.name in placement.weights}
        self._weights = model.graph.initializers
        self._placement = placement
        self._reduce_range = bool(settings.reduce_range)
        self._probes: dict[tuple[str, PatchWindow | None], str] = {}
        self._probe_of: dict[str, str] = {}
        for name, use in placement.weights.items():
            node = self._nodes[name]
            shape = array_of(self._weights[use.weight]).shape
            window = PatchWindow.of(node, shape) if node.op_type == "Conv" else None
            self._probe_of[name] = self._probes.setdefault((use.input, window), f"{name}/mean_patch")

    @property
    def tensors(self) -> tuple[str, ...]:
        """What has to be observed."""
        return tuple(dict.fromkeys(tensor for tensor, _ in self._probes))

    def measure(self, found: Mapping[str, Array]) -> dict[str, Array]:
        """Return the probes of one batch, by name: ``(C, *kernel)`` for a convolution, ``(K,)`` for a product."""
        return {
            name: (window.mean(found[tensor]) if window is not None else mean_row(found[tensor])).astype(np.float32)
            for (tensor, window), name in self._probes.items()
        }

    def shifts(self, statistics: Statistics) -> dict[str, npt.NDArray[np.float32]]:
        """Return the mean output of each node with the rounding error of its weight, ``(channels,)``."""
        return {name: self._shift(name, statistics.mean(probe)) for name, probe in self._probe_of.items()}

    def _shift(self, name: str, patch: Array) -> npt.NDArray[np.float32]:
        use = self._placement.weights[name]
        values = floats_of(self._weights[use.weight])
        integers, scales = quantize_weight(values, use.axis, reduce_range=self._reduce_range)
        shape = [1] * values.ndim
        shape[use.axis] = -1
        return mean_output(self._nodes[name], values - integers * scales.reshape(shape), use.axis, patch)


def _with_outputs(model: ir.Model, names: Sequence[str]) -> ir.Model:
    """Return the graph with some of its tensors as outputs too."""
    copy = model.clone()
    values = {value.name: value for node in copy.graph for value in node.outputs}
    present = {value.name for value in copy.graph.outputs}
    copy.graph.outputs.extend(values[name] for name in names if name not in present)
    return copy
