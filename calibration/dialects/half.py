"""FP16 by casts: weights and kernels in half precision, inputs and outputs in float32."""

from __future__ import annotations

import warnings

import onnx
import onnx_ir as ir

from deploykit.calibration.half import HalfPlan
from deploykit.optional import require


def to_half(model: onnx.ModelProto, plan: HalfPlan) -> onnx.ModelProto:
    """A copy of an FP32 graph in FP16, by ONNX Runtime's converter, but for the weights that the plan keeps."""
    float16 = require("onnxruntime.transformers.float16")
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of every weight that half precision rounds to zero
        converted = float16.convert_float_to_float16(
            copy,
            keep_io_types=True,
            disable_shape_infer=True,
            node_block_list=[node.name for node in copy.graph.node if set(node.input) & set(plan.float_weights)],
        )
    ordered = ir.from_proto(converted)
    ordered.graph.sort()  # the converter appends its casts at the end
    half: onnx.ModelProto = ir.to_proto(ordered)
    return half
