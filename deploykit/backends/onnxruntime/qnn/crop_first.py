"""Concat(x[m:n], x[:m]) -> Concat(y[m:n], y[:m]) with y = x[:n], in ONNX graphs.

Swin's shifted windows crop and roll a padded map so, axis by axis. The compiler of QNN 2.51 moves the slices of the
second axis into the join of the first and forgets the crop: "input sizes on dim 2 add up to 21, output size is 16",
which it reports as a lack of memory.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from deploykit.fusion.data_movement import constant, is_static, producer, sizes
from deploykit.fusion.graph_writer import GraphWriter


def crop_first(model: ir.Model) -> int:
    """Cut what joined slices of one value leave out of its end before they are cut, in place.

    Exact to the bit. Left alone: slices with steps or along several axes, along the batch, with negative or computed
    places, of sizes that are not static, and those that reach the end.

    Returns:
        How many joins read what is cut first.
    """
    return sum(_crop(model, node) for node in list(model.graph) if node.op_type == "Concat")


def _crop(model: ir.Model, join: ir.Node) -> bool:
    slices = [node for part in join.inputs if (node := producer(part)) is not None]
    value, axis = slices[0].inputs[0] if slices else None, join.attributes.get_int("axis", 0)
    ends = [end for node in slices if (end := _end(node, value, axis)) is not None]
    if value is None or len(ends) < len(join.inputs) or max(ends) >= sizes(value)[axis - 1]:
        return False
    shape = list(sizes(value))
    shape[axis - 1] = max(ends)
    first = next(node for node in model.graph if node in slices)
    graph = GraphWriter(model=model, before=first, name=f"{join.outputs[0].name}_crop")
    places = {"start": 0, "end": max(ends), "axis": axis}
    bounds = [graph.constant(np.array([place]), part) for part, place in places.items()]
    cropped = graph.node("Slice", [value, *bounds], tuple(shape), "map")
    for node in slices:
        node.replace_input_with(0, cropped)
    return True


def _end(node: ir.Node, value: ir.Value | None, axis: int) -> int | None:
    """Return where a slice of a value along one axis ends; None where it is anything else."""
    if node.op_type != "Slice" or node.inputs[0] is not value or not is_static(value) or axis < 1:
        return None
    starts, ends, axes, steps = (constant(bound) for bound in (*node.inputs[1:], None, None)[:4])
    if starts is None or ends is None or axes is None or axes.tolist() != [axis]:
        return None
    is_plain = len(node.inputs) < 5 or (steps is not None and steps.tolist() == [1])
    return int(ends[0]) if is_plain and 0 <= starts[0] < ends[0] else None
