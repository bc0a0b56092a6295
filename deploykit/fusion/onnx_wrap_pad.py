"""Pad(x, mode=wrap) -> Concat(x[-b:], x, x[:e]) along each padded axis, in ONNX graphs: few runtimes have the mode."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from deploykit.fusion.data_movement import constant, is_static, sizes
from deploykit.fusion.graph_writer import GraphWriter


def concatenate_wraps(model: ir.Model) -> int:
    """Write each circular padding as what it copies, in place.

    Exact. Left alone: amounts that are computed, negative or longer than the side, a padded batch, and sides that
    are not static.

    Returns:
        How many paddings were rewritten.
    """
    return sum(_rewrite(model, node) for node in list(model.graph) if node.op_type == "Pad")


def _rewrite(model: ir.Model, pad: ir.Node) -> bool:
    value, amounts = pad.inputs[0], constant(pad.inputs[1])
    if pad.attributes.get_string("mode", "constant") != "wrap" or value is None or amounts is None:
        return False
    if not is_static(value) or (len(pad.inputs) > 3 and pad.inputs[3] is not None):
        return False
    sides = list(sizes(value))
    rank = len(sides) + 1
    begins, ends = amounts[:rank].tolist(), amounts[rank:].tolist()
    fits = all(0 <= each <= side for each, side in zip((*begins[1:], *ends[1:]), sides * 2, strict=True))
    if begins[0] or ends[0] or not any(amounts) or not fits:
        return False
    graph = GraphWriter(model=model, before=pad, name=f"{pad.outputs[0].name}_wrap")
    for axis in range(1, rank):
        begin, end, side = begins[axis], ends[axis], sides[axis - 1]
        if not begin and not end:
            continue
        first = [_slice(graph, value, axis, (side - begin, side), f"last_{axis}")] if begin else []
        last = [_slice(graph, value, axis, (0, end), f"first_{axis}")] if end else []
        sides[axis - 1] = begin + side + end
        value = graph.node("Concat", [*first, value, *last], tuple(sides), f"axis_{axis}", {"axis": axis})
    graph.finish(value)
    return True


def _slice(graph: GraphWriter, value: ir.Value, axis: int, span: tuple[int, int], part: str) -> ir.Value:
    start, stop = span
    shape = list(sizes(value))
    shape[axis - 1] = stop - start
    bounds = [
        graph.constant(np.array([number]), f"{part}_{name}")
        for name, number in (("start", start), ("stop", stop), ("axis", axis))
    ]
    return graph.node("Slice", [value, *bounds], tuple(shape), part)
