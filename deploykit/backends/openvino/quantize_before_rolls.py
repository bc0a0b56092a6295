"""QuantizeLinear(Concat(Slice(x), Slice(x))) -> Concat(Slice(QuantizeLinear(x)), ...): round a map before it is rolled.

OpenVINO 2026.4 does not compile a rounding behind the rolled map of a shifted window, and rolls integers faster.
"""

from __future__ import annotations

import onnx_ir as ir

from deploykit.calibration.plan import QuantizationPlan
from deploykit.calibration.quantize_activations import written_in_integers


def quantize_before_rolls(model: ir.Model, plan: QuantizationPlan) -> QuantizationPlan:
    """Move the rounding of each rolled map that integer kernels alone read in front of the roll."""
    shared = written_in_integers(plan.placement, between=False)
    for quantize in [node for node in model.graph if node.op_type == "QuantizeLinear"]:
        tensor = str(quantize.name).removesuffix("/quantize")
        value = quantize.inputs[0]
        if value is None or tensor in shared or value.is_graph_output() or len(list(value.uses())) != 1:
            continue
        pieces = _rolled_pieces(value)
        if pieces:
            _move(quantize, pieces, value)
    return plan


def _move(quantize: ir.Node, pieces: list[ir.Node], rolled: ir.Value) -> None:
    integers = quantize.outputs[0]
    for reader in list(integers.uses()):
        reader.node.replace_input_with(reader.idx, rolled)  # cut and joined, the integers arrive where the floats did
    quantize.replace_input_with(0, pieces[0].inputs[0])
    for piece in pieces:
        piece.replace_input_with(0, integers)


def _rolled_pieces(value: ir.Value) -> list[ir.Node]:
    """Return the Slices of one tensor that Concats join to ``value``, as a roll does along each axis; else none."""
    joined = value.producer()
    if joined is not None and joined.op_type == "Reshape" and joined.inputs[0] is not None:
        whole = joined.inputs[0]
        joined = whole.producer() if len(list(whole.uses())) == 1 and not whole.is_graph_output() else None
    if joined is None or joined.op_type != "Concat":
        return []
    pieces = [part.producer() for part in joined.inputs if part is not None]
    cut = [piece for piece in pieces if piece is not None and piece.op_type == "Slice"]
    sources = {piece.inputs[0] for piece in cut}
    if len(cut) != len(pieces) or len(sources) != 1:
        return []
    (source,) = sources
    if source is None or set(source.consumers()) != set(cut):
        return cut
    return _rolled_pieces(source) or cut
