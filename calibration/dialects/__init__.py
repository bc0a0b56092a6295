"""A quantization plan, or another precision, written into a graph in the form that a runtime fuses."""

from __future__ import annotations

DIALECTS: dict[str, str] = {
    "torch_compile": "deploykit.calibration.dialects.inductor:render",
    "onnxruntime": "deploykit.calibration.dialects.onnxruntime:render",
    "openvino": "deploykit.calibration.dialects.openvino:render",
    "tensorrt": "deploykit.calibration.dialects.tensorrt:render",
}
