"""FP16 by casts: weights and kernels in half precision, inputs and outputs in float32."""

from __future__ import annotations

import warnings

import onnx_ir as ir

from deploykit.backends.backend import resolve
from deploykit.backends.table import HALF_CONVERTER
from deploykit.calibration.half import HalfPlan


def cast_to_half(model: ir.Model, plan: HalfPlan) -> ir.Model:
    """Return an FP32 graph in FP16, by ONNX Runtime's converter, but for the weights that the plan keeps."""
    float16 = resolve(HALF_CONVERTER)()
    source = ir.to_proto(model)  # the converter works on protobuf messages
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of every weight that half precision rounds to zero
        converted = float16.convert_float_to_float16(
            source,
            keep_io_types=True,
            disable_shape_infer=True,
            node_block_list=[node.name for node in source.graph.node if set(node.input) & set(plan.float_weights)],
        )
    half: ir.Model = ir.from_proto(converted)
    half.graph.sort()  # the converter appends its casts at the end
    return half
