"""TensorRT: int8 activations with zero point 0 written out, int8 weights, float biases, every Relu and Clip kept.

With signed integers the negative half of a range passes, so an activation cannot be left to the
rounding as with uint8. What stays in float is FP32, or FP16 by casts where the plan says so: a
strongly typed network computes in the graph's types and no others.
"""

from __future__ import annotations

from dataclasses import replace

from deploykit.calibration.dialects import onnxruntime
from deploykit.calibration.dialects.half import to_half
from deploykit.calibration.dialects.qdq import QdqStyle
from deploykit.calibration.half import HalfPlan
from deploykit.calibration.plan import QuantizationPlan
from deploykit.calibration.precision import PrecisionPlan
from deploykit.graph import Graph

STYLE = QdqStyle(symmetric=True, all_writes=False, integer_bias=False, drop_activations=False)


def render(master: Graph, plan: PrecisionPlan) -> Graph:
    """The master graph in the plan's precision, as ONNX; raises ExportError as ONNX Runtime's dialect does."""
    graph = onnxruntime.render(master, plan, STYLE)
    if isinstance(plan, QuantizationPlan) and plan.float_dtype == "fp16" and graph.model is not None:
        return replace(graph, model=to_half(graph.model, HalfPlan(float_weights={})))
    return graph
