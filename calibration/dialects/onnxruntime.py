"""ONNX Runtime on x86: uint8 activations, int8 weights, no float left between integer convolutions."""

from __future__ import annotations

from dataclasses import replace

from deploykit.calibration.dialects.half import to_half
from deploykit.calibration.dialects.qdq import QdqStyle, insert_qdq
from deploykit.calibration.half import HalfPlan
from deploykit.calibration.plan import QuantizationPlan
from deploykit.calibration.precision import PrecisionPlan
from deploykit.errors import ExportError
from deploykit.graph import Graph

STYLE = QdqStyle(
    symmetric=False,
    all_writes=True,
    integer_bias=True,
    drop_activations=True,
    integer_gates=True,
    dynamic_products=True,
    wide_groups=True,
    float_image_side=True,
    pointlike_weights=0,
)
"""A convolution becomes QLinearConv only when its output is quantized too, whoever reads it. A matrix
product writes float to LayerNorm, GELU or softmax: between fixed ranges it does not become one kernel.
"""


def render(master: Graph, plan: PrecisionPlan, style: QdqStyle = STYLE) -> Graph:
    """The master graph in the precision of the plan (None: FP32), as ONNX.

    Raises:
        ExportError: the graph has no ONNX form, or the plan is of a precision that ONNX graphs here do not have.
    """
    if master.model is None:
        raise ExportError("the graph has no ONNX form; trace the backbone with to_onnx first.")
    if plan is None:
        model = master.model
    elif isinstance(plan, HalfPlan):
        model = to_half(master.model, plan)
    elif isinstance(plan, QuantizationPlan):
        model = insert_qdq(master.model, plan, style)
    else:
        raise ExportError(f"no ONNX graph can be made from a {type(plan).__name__}. Use fp32, fp16 or int8.")
    return replace(master, model=model, program=None)
