"""TensorRT: int8 activations with zero point 0 written out, int8 weights, float biases, every Relu and Clip kept.

With signed integers the negative half of a range passes, so an activation cannot be left to the
rounding as with uint8.
"""

from __future__ import annotations

from deploykit.calibration.dialects import onnxruntime
from deploykit.calibration.dialects.qdq import QdqStyle
from deploykit.calibration.precision import PrecisionPlan
from deploykit.graph import Graph

STYLE = QdqStyle(symmetric=True, all_writes=False, integer_bias=False, drop_activations=False)


def render(master: Graph, plan: PrecisionPlan) -> Graph:
    """The master graph in the plan's precision, as ONNX; raises ExportError as ONNX Runtime's dialect does."""
    return onnxruntime.render(master, plan, STYLE)
