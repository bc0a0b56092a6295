"""What ONNX Runtime's form of gated maps makes of a plan's roundings: see ``integer_gates.py``."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from deploykit.backends.onnxruntime.integer_gates import clip_gate_ranges, fold_hard_sigmoids
from deploykit.calibration.kernel_rounding import KernelRounding
from deploykit.calibration.placement import is_gated
from deploykit.calibration.plan import QuantizationPlan


def kernel_rounding(model: ir.Model, plan: QuantizationPlan) -> KernelRounding:
    """Return the gates that are rounded, and what is rounded otherwise since they are."""
    folded = fold_hard_sigmoids(model.clone(), plan)
    clipped = clip_gate_ranges(model, plan)
    return KernelRounding(
        left_out=frozenset(plan.placement.writes) - frozenset(folded.placement.writes),
        ranges={name: found for name, found in clipped.ranges.items() if found is not plan.ranges.get(name)},
        gated=frozenset(
            str(node.outputs[0].name)
            for node in model.graph
            if is_gated(node) and node.outputs[0].name in plan.placement.between
        ),
        bias_offsets={
            name: offset
            for name, shift in folded.bias_shift.items()
            if (offset := float(np.max(shift - plan.bias_shift.get(name, np.float32(0)))))
        },
    )
