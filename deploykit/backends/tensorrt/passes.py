"""TensorRT: int8 activations with zero point 0 written out, int8 weights, float biases, every Relu and Clip kept.

With signed integers the negative half of a range passes, so an activation cannot be left to the
rounding as with uint8. What stays in float is FP32, or FP16 by casts where the plan says so: a
strongly typed network computes in the graph's types and no others.
"""

from __future__ import annotations

from deploykit.calibration.dialect import OnnxDialect
from deploykit.calibration.float_fallback import keep_pointlike
from deploykit.calibration.quantize_activations import INT8, quantize_activations
from deploykit.calibration.quantize_weights import quantize_weights
from deploykit.calibration.tidy_graph import tidy_graph
from deploykit.fusion.onnx_passes import OnnxPass
from deploykit.fusion.onnx_wrap_pad import concatenate_wraps
from deploykit.fusion.pipeline import EXACT_DB

DIALECT = OnnxDialect(
    activations=INT8,
    float_choices=(keep_pointlike(),),
    legalize=(OnnxPass(name="tensorrt-wrap-pad", rewrite=concatenate_wraps, min_sqnr_db=EXACT_DB),),
    int8=(quantize_weights(integer_bias=False), quantize_activations(INT8), tidy_graph),
)
