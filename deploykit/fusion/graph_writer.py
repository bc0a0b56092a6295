"""New nodes of an ONNX graph, with names and shapes that are the same in every export."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from deploykit.arrays import Array
from deploykit.fusion.data_movement import sizes


@dataclass(frozen=True, kw_only=True)
class GraphWriter:
    """Adds nodes in front of one. Values are ``(N, ...)``; shapes are given without ``N``."""

    model: ir.Model
    before: ir.Node
    name: str

    def node(  # noqa: PLR0917  (a node's own parts)
        self,
        op_type: str,
        inputs: list[ir.Value | None],
        shape: tuple[int, ...],
        part: str,
        attributes: Mapping[str, Any] | None = None,
        domain: str = "",
    ) -> ir.Value:
        """Return the result of a new node."""
        node = ir.node(op_type, inputs, attributes, domain=domain, name=f"{self.name}/{part}")
        self.model.graph.insert_before(self.before, node)
        (result,) = node.outputs
        result.name = f"{self.name}_{part}"
        result.shape, result.type = ir.Shape([None, *shape]), ir.TensorType(ir.DataType.FLOAT)
        return result

    def constant(self, numbers: Array, part: str) -> ir.Value:
        """Return a new initializer."""
        name = f"{self.name}_{part}"
        tensor = ir.tensor(np.ascontiguousarray(numbers), name=name)
        value = ir.Value(name=name, shape=ir.Shape(numbers.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.model.graph.register_initializer(value)
        return value

    def finish(self, value: ir.Value) -> None:
        """Put a value in the place of the one result of the node behind, with its name, and remove the node."""
        result = self.before.outputs[0]
        ir.convenience.replace_nodes_and_values(self.model.graph, self.before, [self.before], [], [result], [value])

    def shaped(self, value: ir.Value, shape: tuple[int, ...], part: str) -> ir.Value:
        """Return a value in another shape, whose first axis takes what the others leave."""
        if value.shape is not None and tuple(value.shape[1:]) == shape:
            return value
        target = self.constant(np.array([-1, *shape]), f"{part}_shape")
        return self.node("Reshape", [value, target], shape, part)

    def taken(self, tokens: ir.Value, places: Array, part: str) -> ir.Value:
        """The tokens at ``places`` of ``(N, ..., C)``: ``(N, len(places), C)``, or as they are where all stay."""
        *sides, channels = sizes(tokens)
        count = math.prod(sides)
        if np.array_equal(places, np.arange(count)):
            return tokens
        flat = self.shaped(tokens, (count, channels), f"{part}_tokens")
        inputs: list[ir.Value | None] = [flat, self.constant(places, f"{part}_places")]
        return self.node("Gather", inputs, (len(places), channels), part, {"axis": 1})
