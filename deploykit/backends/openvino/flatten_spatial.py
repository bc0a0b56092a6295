"""Maps with the channels last as tokens: ``(N, H, W, C) -> (N, H * W, C)`` through norms, linears and what is between.

OpenVINO fuses what follows a linear layer, normalizes in one kernel and lays channels last for free with three
dimensions. With four it subtracts zero points, and takes a LayerNorm apart, in passes over the whole map.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from deploykit.calibration.placement import Placement
from deploykit.calibration.plan import QuantizationPlan
from deploykit.onnx_values import add_constant, shape_of_value, written_by

_ANY_SHAPE = ("Gelu", "Relu", "Clip", "Sigmoid", "Mul", "Add")


def flatten_spatial(model: ir.Model, plan: QuantizationPlan) -> QuantizationPlan:
    """Give maps with channels last one dimension for their places.

    Every node keeps its name, and every tensor that a linear layer reads. What convolutions write, and outputs that
    are read, stay maps. Comes first: it needs the shapes of the master graph.
    """
    flattener = _Flattener(model.graph, plan.placement)
    for node in list(model.graph):
        flattener.visit(node)
    flattener.finish()
    return plan


class _Flattener:
    """One walk over a graph; ``maps`` holds each tensor that has become tokens, with the shape of its map."""

    def __init__(self, graph: ir.Graph, placement: Placement) -> None:
        self.graph = graph
        self.placement = placement
        self.maps: dict[ir.Value, tuple[int, int, int]] = {}
        self._tokens: dict[ir.Value, ir.Value] = {}
        self._renamed: set[ir.Value] = set()
        self._converted: set[ir.Node] = set()

    def visit(self, node: ir.Node) -> None:
        """Let a node work on tokens where it can."""
        output = node.outputs[0]
        shape = _map_shape(output)
        given = output.is_graph_output() and output.name in self.placement.reads
        if shape is None or given or not self._fits(node):
            return
        source = node.inputs[0]
        if source is not None and source not in self.maps and node.op_type in ("LayerNormalization", "MatMul"):
            before = _map_shape(source)
            if before is None or source.is_graph_output() or source.name in self.placement.writes:
                return
            node.replace_input_with(0, self._flat(source, before, named=node.op_type == "MatMul"))
        self.maps[output] = shape
        self._converted.add(node)
        output.shape = ir.Shape([shape_of_value(output)[0], shape[0] * shape[1], shape[2]])

    def finish(self) -> None:
        """Give the nodes that work on maps their maps."""
        for value, shape in self.maps.items():
            readers = [use for use in value.uses() if use.node not in self._converted]
            if not readers and not value.is_graph_output():
                continue
            sizes = add_constant(self.graph, f"{value.name}/map_shape", np.array([0, *shape]))
            node = ir.node("Reshape", [value, sizes], name=f"{value.name}/map")
            self.graph.insert_after(written_by(value), node)
            node.outputs[0].name = f"{value.name}/map"
            node.outputs[0].shape = ir.Shape([shape_of_value(value)[0], *shape])
            node.outputs[0].type = value.type
            for reader in readers:
                reader.node.replace_input_with(reader.idx, node.outputs[0])
            if value.is_graph_output():
                self.graph.outputs[list(self.graph.outputs).index(value)] = node.outputs[0]
                value.name, node.outputs[0].name = f"{value.name}/tokens", value.name

    def _fits(self, node: ir.Node) -> bool:
        if node.op_type == "LayerNormalization":
            return node.attributes.get_int("axis", -1) in (-1, 3)
        if node.op_type == "MatMul":
            weight = node.inputs[1]
            return weight is not None and weight.is_initializer() and _rank(weight) == 2
        if node.op_type not in _ANY_SHAPE:
            return False
        flat = [value in self.maps for value in node.inputs if value is not None]
        vectors = [value is not None and value.is_initializer() and _rank(value) <= 1 for value in node.inputs]
        return any(flat) and all(one or other for one, other in zip(flat, vectors, strict=True))

    def _flat(self, source: ir.Value, shape: tuple[int, int, int], *, named: bool) -> ir.Value:
        """Return the tokens of a map; ``named``: under its name, by which a plan knows what a linear layer reads."""
        tokens = self._tokens.get(source)
        if tokens is None:
            sizes = add_constant(self.graph, f"{source.name}/token_shape", np.array([0, shape[0] * shape[1], shape[2]]))
            node = ir.node("Reshape", [source, sizes], name=f"{source.name}/tokens")
            self.graph.insert_after(written_by(source), node)
            tokens = self._tokens[source] = node.outputs[0]
            tokens.shape = ir.Shape([shape_of_value(source)[0], shape[0] * shape[1], shape[2]])
            tokens.type, tokens.name = source.type, f"{source.name}/tokens"
        if named and source not in self._renamed:
            self._renamed.add(source)
            tokens.name, source.name = source.name, f"{source.name}/map"
        return tokens


def _map_shape(value: ir.Value) -> tuple[int, int, int] | None:
    """Height, width and channels of a map with channels last, ``(N, H, W, C)``; None where they are not known."""
    if value.shape is None or len(value.shape) != 4 or value.producer() is None:
        return None
    sizes = [size for size in value.shape[1:] if isinstance(size, int)]
    return (sizes[0], sizes[1], sizes[2]) if len(sizes) == 3 else None


def _rank(value: ir.Value) -> int:
    return len(value.shape) if value.shape is not None else -1
