"""The stock quantizers, as their users call them: what the benchmarks of INT8 put ours beside.

Each takes a plain ONNX graph and calibration images, and has the settings that its documentation advises: where this
processor adds INT8 products in 16 bits, ranges of weights are halved so that none saturates.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx

from deploykit.arrays import FloatArray
from deploykit.processor import saturates


def nncf_route(model: onnx.ModelProto, images: FloatArray) -> onnx.ModelProto:
    """NNCF's post-training quantization of the ONNX graph, mixed preset, as a transformer where it is one."""
    return by_nncf(copy.deepcopy(model), model, images)


def by_nncf(form: Any, model: onnx.ModelProto, images: FloatArray) -> Any:
    """Quantize a form of a graph that NNCF reads; ``model`` is the same graph as ONNX."""
    import nncf

    dataset = nncf.Dataset([image[None] for image in images], lambda image: {"images": image})
    transformer = nncf.ModelType.TRANSFORMER if any(node.op_type == "Softmax" for node in model.graph.node) else None
    fix = nncf.OverflowFix.ENABLE if saturates(None) else nncf.OverflowFix.FIRST_LAYER  # the latter is its default
    return nncf.quantize(
        form,
        dataset,
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(images),
        model_type=transformer,
        advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=fix),
    )


def static_route(model: onnx.ModelProto, images: FloatArray) -> onnx.ModelProto:
    """ONNX Runtime's static quantization, per channel, Q/DQ, uint8 activations and int8 weights."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(images)

        def get_next(self) -> Any:
            image = next(self.left, None)
            return None if image is None else {"images": image[None]}

    with tempfile.TemporaryDirectory() as scratch:
        source, target = Path(scratch) / "fp32.onnx", Path(scratch) / "int8.onnx"
        onnx.save(model, source)
        quantize_static(
            source,
            target,
            Reader(),
            per_channel=True,
            reduce_range=saturates(None),
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        return onnx.load(target)


def dynamic_route(model: onnx.ModelProto, images: FloatArray) -> onnx.ModelProto:
    """ONNX Runtime's dynamic quantization of matrix products, per channel; takes no images."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as scratch:
        source, target = Path(scratch) / "fp32.onnx", Path(scratch) / "int8.onnx"
        onnx.save(model, source)
        quantize_dynamic(
            source,
            target,
            per_channel=True,
            reduce_range=saturates(None),
            op_types_to_quantize=["MatMul", "Gemm"],
            weight_type=QuantType.QInt8,
        )
        return onnx.load(target)


STOCK: dict[str, Callable[[onnx.ModelProto, FloatArray], onnx.ModelProto]] = {
    "quantize_static": static_route,
    "quantize_dynamic": dynamic_route,
    "NNCF on ONNX": nncf_route,
}
