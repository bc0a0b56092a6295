"""onnx's reference evaluator: every operator in NumPy, on the CPU."""

from deploykit.backends.backend import Backend
from deploykit.optional import PACKAGES

BACKEND = Backend(
    name="onnx_reference",
    package=PACKAGES["onnx"],
    precisions=("fp32", "int8"),
    version_rule="same_or_newer",
    devices="tests.backends.onnx_reference.adapter:OnnxReference.devices",
    adapter="tests.backends.onnx_reference.adapter:OnnxReference",
    dialect="tests.backends.onnx_reference.passes:DIALECT",
    lower="tests.backends.onnx_reference.lower:lower",
)
