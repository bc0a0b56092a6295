"""``Q(Relu(DQ(Q(Conv(x))) + DQ(y)))`` in OpenVINO's kernels: the inner Q clips, and does not round.

A convolution fuses the sum and the rounding behind it. Of the two roundings in that kernel OpenVINO 2026.4 does the
last alone, in uint8; where what the sum gives stays in float, it does both.
"""

from __future__ import annotations

import onnx_ir as ir

from deploykit.calibration.kernel_rounding import KernelRounding
from deploykit.calibration.placement import fused_activation
from deploykit.calibration.plan import QuantizationPlan


def kernel_rounding(model: ir.Model, plan: QuantizationPlan) -> KernelRounding:
    """Return the tensors that are clipped alone: what a convolution writes for a sum which it fuses."""
    written = set(plan.placement.writes)
    clipped: set[str] = set()
    for node in model.graph:
        if node.op_type != "Add" or not _is_kept_in_integers(_after_activation(node), plan):
            continue
        operands = [value for value in node.inputs if value is not None]
        if len(operands) == 2 and all(value.name in written for value in operands):
            fused = next((value for value in operands if _is_fused(value, plan)), None)
            clipped |= {str(fused.name)} if fused is not None else set()
    return KernelRounding(clipped=frozenset(clipped))


def _after_activation(node: ir.Node) -> ir.Value:
    activation = fused_activation(node.outputs[0])
    return (activation or node).outputs[0]


def _is_kept_in_integers(total: ir.Value, plan: QuantizationPlan) -> bool:
    """Return whether a sum is rounded for everyone and an integer kernel is among what reads it."""
    written = plan.placement.writes
    return total.name in written and any(
        reader.name in plan.placement.weights
        or reader.op_type == "MaxPool"
        or (reader.op_type == "Add" and _after_activation(reader).name in written)
        for reader in total.consumers()
    )


def _is_fused(value: ir.Value, plan: QuantizationPlan) -> bool:
    """Return whether a convolution of the plan writes a value for one reader alone."""
    producer = value.producer()
    if producer is not None and producer.op_type in ("Relu", "Clip") and producer.inputs[0] is not None:
        producer = producer.inputs[0].producer()
    in_integers = producer is not None and producer.op_type == "Conv" and producer.name in plan.placement.weights
    return in_integers and len(list(value.uses())) == 1 and not value.is_graph_output()
