"""The package onnxruntime, which several distributions bring."""

from __future__ import annotations

from deploykit.backends.onnxruntime.protocols import OnnxRuntimePackage
from deploykit.optional import OptionalPackage, require

PACKAGE = OptionalPackage(
    module="onnxruntime",
    distribution="onnxruntime",
    extra="onnxruntime",
    feature="the onnxruntime runtime",
    distributions=(
        "onnxruntime-gpu",
        "onnxruntime-openvino",
        "onnxruntime-directml",
        "onnxruntime-training",
        "onnxruntime-rocm",
        "onnxruntime-migraphx",
        "onnxruntime-windowsml",
        "onnxruntime-vitisai",
        "onnxruntime-silicon",
        "ort-nightly",
        "ort-nightly-gpu",
        "ort-nightly-directml",
    ),
)


def load_onnxruntime() -> OnnxRuntimePackage:
    """Import the package; see `deploykit.optional.require`."""
    return require("onnxruntime", PACKAGE)
