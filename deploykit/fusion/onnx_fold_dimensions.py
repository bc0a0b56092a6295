"""Transpose(x of six dimensions and more) -> Reshape, Transpose of at most five, in ONNX graphs.

Swin's windows and heads stand in up to seven dimensions, which NPUs do not have. A value of more than five is held as
one of fewer, with the same elements in the same order, as `deploykit.fusion.fold_dimensions` does in torch programs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from deploykit.fusion.fold_dimensions import MOST_DIMENSIONS, Shape, permutations
from deploykit.onnx_values import add_constant

_SAME_ORDER = ("Reshape", "Squeeze", "Unsqueeze", "Flatten")
_FOLDED = (*_SAME_ORDER, "Transpose", "Split")


def fold_onnx_dimensions(model: ir.Model) -> int:
    """Write what only moves the elements of values with more than five dimensions with at most five, in place.

    Exact to the bit. Left alone: what computes on such a value and what that reads, sizes that are not static, graph
    outputs of more than five dimensions, and permutations that two of five dimensions do not make.

    Returns:
        How many permutations and splits were written.
    """
    folding = _Folding(model=model)
    for node in list(model.graph):
        if node.op_type in _FOLDED and _is_beyond(node) and all(map(_is_static, (node.inputs[0], *node.outputs))):
            folding.fold(node)
    if folding.written:
        common.RemoveUnusedNodesPass()(model)
    return folding.written


def _is_beyond(node: ir.Node) -> bool:
    values = (node.inputs[0], *node.outputs)
    return any(value is not None and value.shape is not None and len(value.shape) > MOST_DIMENSIONS for value in values)


def _is_static(value: ir.Value | None) -> bool:
    return value is not None and value.shape is not None and len(_shape(value)) == len(value.shape)


def _shape(value: ir.Value | None) -> Shape:
    shape = value.shape if value is not None else None
    return () if shape is None else tuple(side for side in shape if isinstance(side, int))


@dataclass(kw_only=True, eq=False)
class _Folding:
    """``held`` has, for a value of more than five dimensions, one of fewer with the same elements in the same order."""

    model: ir.Model
    held: dict[ir.Value, ir.Value] = field(default_factory=dict)
    written: int = 0

    def fold(self, node: ir.Node) -> None:
        """Compute what a node gives from what is held of its input, beside the node."""
        value = node.inputs[0]
        assert value is not None  # noqa: S101  (an operand that the operators require; narrows the type)
        source = value if len(_shape(value)) <= MOST_DIMENSIONS else self.held.get(value)
        if source is None:
            return
        if node.op_type in _SAME_ORDER:
            self._hold(node, 0, source)
        elif node.op_type == "Transpose":
            self._permute(node, source)
        else:
            self._split(node, source)

    def _permute(self, node: ir.Node, source: ir.Value) -> None:
        shape = _shape(node.inputs[0])
        order = tuple(node.attributes.get_ints("perm", tuple(reversed(range(len(shape))))))
        steps = permutations(shape, order)
        if not steps:
            return
        for place, step in enumerate(steps):
            grouped = self._reshape(node, source, step.shape, f"grouped_{place}")
            shape = tuple(step.shape[dimension] for dimension in step.order)
            (source,) = self._add(node, "Transpose", [grouped], [shape], f"permuted_{place}", perm=step.order)
        self.written += 1
        self._hold(node, 0, source)

    def _split(self, node: ir.Node, source: ir.Value) -> None:
        shape = _shape(node.inputs[0])
        axis = node.attributes.get_int("axis", 0) % len(shape)
        before, after = math.prod(shape[:axis]), math.prod(shape[axis + 1 :])
        grouped = self._reshape(node, source, (before, shape[axis], after), "grouped")
        shapes = [(before, _shape(part)[axis], after) for part in node.outputs]
        sizes = self._constant(node, tuple(part[1] for part in shapes), "sizes")
        parts = self._add(node, "Split", [grouped, sizes], shapes, "part", axis=1)
        self.written += 1
        for place, part in enumerate(parts):
            self._hold(node, place, part)

    def _hold(self, node: ir.Node, place: int, source: ir.Value) -> None:
        """Let a value with the elements of an output stand for it; one of at most five dimensions takes its place."""
        output = node.outputs[place]
        if len(_shape(output)) > MOST_DIMENSIONS:
            self.held[output] = source
            return
        folded = self._reshape(node, source, _shape(output), f"folded_{place}")
        ir.convenience.replace_all_uses_with(output, folded, replace_graph_outputs=True)
        output.name, folded.name = f"{output.name}/beyond_five", output.name

    def _reshape(self, node: ir.Node, source: ir.Value, shape: Shape, part: str) -> ir.Value:
        (result,) = self._add(node, "Reshape", [source, self._constant(node, shape, f"{part}_shape")], [shape], part)
        return result

    def _constant(self, node: ir.Node, sizes: Shape, part: str) -> ir.Value:
        return add_constant(self.model.graph, f"{node.name}/{part}", np.array(sizes, np.int64))

    def _add(
        self,
        node: ir.Node,
        op_type: str,
        inputs: list[ir.Value],
        shapes: Sequence[Shape],
        part: str,
        **attributes: int | Shape,
    ) -> list[ir.Value]:
        """Put a node behind one, with the type of what that gives."""
        added = ir.node(op_type, inputs, attributes, num_outputs=len(shapes), name=f"{node.name}/{part}")
        self.model.graph.insert_before(node, added)
        for place, (result, shape) in enumerate(zip(added.outputs, shapes, strict=True)):
            result.name = f"{node.name}/{part}/{place}"
            result.shape, result.type = ir.Shape(shape), node.outputs[0].type
        return list(added.outputs)
