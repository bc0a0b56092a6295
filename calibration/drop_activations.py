"""QuantizeLinear(Relu(x)) -> QuantizeLinear(x), and Clip(x, 0, top) likewise: rounding to the range clips as they do.

Exact where the zero point is 0 and the range does not pass the Clip's bound; signed integers let the negative half
pass, so this is for uint8 alone.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from deploykit.calibration.plan import QuantizationPlan
from deploykit.calibration.quantize_activations import written_in_integers

_ROUNDING = 1 + 1e-6
"""The range is measured after the Clip, so it may pass the bound by a rounding error only."""


def drop_activations(*, between: bool = False) -> Callable[[ir.Model, QuantizationPlan], QuantizationPlan]:
    """Make the pass that follows `quantize_activations`, with the same ``between``."""

    def rewrite(model: ir.Model, plan: QuantizationPlan) -> QuantizationPlan:
        quantizers = {str(node.name): node for node in model.graph if node.op_type == "QuantizeLinear"}
        for tensor in sorted(written_in_integers(plan.placement, between=between or plan.imported)):
            quantize = quantizers.get(f"{tensor}/quantize")
            if quantize is not None:
                _drop(quantize, plan.range_of(tensor).high)
        return plan

    return rewrite


def _drop(quantize: ir.Node, top: float) -> None:
    value, zero_point = quantize.inputs[0], quantize.inputs[2]
    node = value.producer() if value is not None else None
    if node is None or node.op_type not in ("Relu", "Clip") or _scalar(zero_point) != 0:
        return
    if node.op_type == "Clip":
        low, high = (_scalar(operand) for operand in (*node.inputs[1:], None, None)[:2])
        if low != 0.0 or (high is not None and top > high * _ROUNDING):
            return
    source = node.inputs[0]
    if source is not None and len(list(source.uses())) == 1:
        quantize.replace_input_with(0, source)


def _scalar(value: ir.Value | None) -> float | None:
    if value is None or value.const_value is None:
        return None
    return float(value.const_value.numpy())
