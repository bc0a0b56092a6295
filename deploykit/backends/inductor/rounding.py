"""What inductor's kernels round of a plan: what layers read, and one summand of the sums that convolutions fuse."""

from __future__ import annotations

import onnx_ir as ir

from deploykit.calibration.kernel_rounding import KernelRounding
from deploykit.calibration.plan import QuantizationPlan


def kernel_rounding(model: ir.Model, plan: QuantizationPlan) -> KernelRounding:
    """Return that what kernels write stays in float but for what reads it in integers."""
    read = set(plan.placement.reads)
    fused: set[str] = set()
    summands: set[tuple[str, str]] = set()
    for node in model.graph:
        operands = [value for value in node.inputs if value is not None]
        if node.op_type != "Add" or len(operands) != 2 or not all(value.name in read for value in operands):
            continue
        for own, other in (operands[::-1], operands):  # the second operand is fused, where both can be
            if _is_fusible(own):
                fused.add(str(own.name))
                summands.add((str(other.name), str(node.outputs[0].name)))
                break
    return KernelRounding(left_out=frozenset(fused), summands=frozenset(summands), readers_only=True)


def _is_fusible(value: ir.Value) -> bool:
    producer = value.producer()
    alone = len(list(value.uses())) == 1 and not value.is_graph_output()
    return alone and producer is not None and producer.op_type == "Conv"
