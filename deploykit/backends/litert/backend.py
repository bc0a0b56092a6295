"""LiteRT: .tflite files, on the CPU through its XNNPACK kernels."""

from deploykit.backends.backend import Backend
from deploykit.backends.litert.package import PACKAGE

BACKEND = Backend(
    name="litert",
    package=PACKAGE,
    precisions=("fp32", "fp16", "int8"),
    version_rule="same_or_newer",
    source="torch",
    tunable=("threads",),
    devices="deploykit.backends.litert.adapter:LiteRTRuntime.devices",
    adapter="deploykit.backends.litert.adapter:LiteRTRuntime",
    dialect="deploykit.backends.litert.passes:DIALECT",
    lower="deploykit.backends.litert.lower:lower",
    inspect="deploykit.backends.litert.inspect:left_in_float",
)
