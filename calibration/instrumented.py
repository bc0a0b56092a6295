"""The master graph as calibration runs it: each tensor that needs a range is an output, and so is each bias probe."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from deploykit.arrays import Array, FloatArray
from deploykit.calibration.placement import Placement, place
from deploykit.calibration.ranges import quantize_weight
from deploykit.errors import CalibrationError
from deploykit.onnx_session import onnx_session
from deploykit.onnx_values import floats_of
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
        probes = BiasProbes(model, self.placement, settings) if settings.bias_correction else None
        self.averaged = probes.outputs if probes else {}
        """The node of each probe's output."""
        self._session = onnx_session(_instrument(model, self.placement, probes))
        self._source = str(model.graph.inputs[0].name)

    def observe(self, batch: FloatArray) -> tuple[dict[str, Array], dict[str, Array]]:
        """Run one batch, ``(N, C, H, W)``; return the tensors that need a range, and the probes, by name."""
        feeds = {self._source: batch}
        tensors, probes = self.placement.tensors, self.averaged
        wanted = [name for name in (*tensors, *probes) if name not in feeds]
        found = dict(zip(wanted, self._session.run(wanted, feeds), strict=True)) | feeds
        return {name: found[name] for name in tensors}, {name: found[name] for name in probes}


class BiasProbes:
    """Beside each integer node, the same node with the rounding error of its weight, averaged a channel."""

    def __init__(self, model: ir.Model, placement: Placement, settings: Int8) -> None:
        self._reduce_range = bool(settings.reduce_range)
        self._weights = model.graph.initializers
        self._placement = placement
        self.outputs = {f"{node}/mean_error": node for node in placement.weights}

    def add_to(self, graph: ir.Graph) -> None:
        """Insert the probes into a copy of the master graph."""
        nodes = {node.name: node for node in graph}
        for output, name in self.outputs.items():
            use = self._placement.weights[name]
            values = floats_of(self._weights[use.weight])
            integers, scales = quantize_weight(values, use.axis, reduce_range=self._reduce_range)
            shape = [1] * values.ndim
            shape[use.axis] = -1
            error = add_constant(graph, f"{name}/error", values - integers * scales.reshape(shape))
            node = nodes[name]
            twin = ir.node(node.op_type, [node.inputs[0], error], dict(node.attributes), name=f"{name}/twin")
            channel = 1 if node.op_type == "Conv" else -1
            rank = len(node.outputs[0].shape or ())
            axes = [axis for axis in range(rank) if axis != channel % rank]
            mean = ir.node(
                "ReduceMean", [twin.outputs[0], add_constant(graph, f"{name}/axes", np.array(axes))], {"keepdims": 0}
            )
            mean.outputs[0].name = output
            graph.extend([twin, mean])
            graph.outputs.append(mean.outputs[0])


def add_constant(graph: ir.Graph, name: str, array: Array) -> ir.Value:
    """Register an array as an initializer of a graph."""
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def _instrument(model: ir.Model, placement: Placement, probes: BiasProbes | None) -> ir.Model:
    """Return the graph with every tensor that needs a range as an output."""
    copy = model.clone()
    values = {value.name: value for node in copy.graph for value in node.outputs}
    present = {value.name for value in copy.graph.outputs}
    for name in placement.tensors:
        if name in values and name not in present:
            copy.graph.outputs.append(values[name])
    if probes:
        probes.add_to(copy.graph)
    return copy
