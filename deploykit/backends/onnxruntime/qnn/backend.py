"""Qualcomm's NPU in ONNX Runtime: context binaries by SoC, built here, checked in a simulator, run on the device."""

from deploykit.backends.backend import Backend
from deploykit.backends.onnxruntime.package import PACKAGE
from deploykit.backends.onnxruntime.qnn.package import DEVICE, PLUGIN, SIMULATOR

BACKEND = Backend(
    name="onnxruntime",
    package=PACKAGE,
    plugin=PLUGIN,
    accelerator=DEVICE,
    simulator=SIMULATOR,
    precisions=("fp16", "int8"),
    int8_float_dtypes=("fp16",),
    version_rule="same_or_newer",
    least_version="deploykit.backends.onnxruntime.needs:least_version",
    batches=False,
    uses_cpu=False,
    open_options=("htp_arch", "soc_model"),
    check_settings="deploykit.backends.onnxruntime.qnn.socs:soc_of",
    devices="deploykit.backends.onnxruntime.qnn.package:devices",
    tie="deploykit.backends.onnxruntime.qnn.package:machine_tie",
    adapter="deploykit.backends.onnxruntime.qnn.adapter:QnnRuntime",
    dialect="deploykit.backends.onnxruntime.qnn.passes:DIALECT",
    code_suffix=".onnx",
    lower="deploykit.backends.onnxruntime.qnn.lower:lower",
)
