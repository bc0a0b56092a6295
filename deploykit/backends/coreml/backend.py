"""Core ML: .mlpackage folders, for apps on iPhones, iPads and Macs; Python opens them on macOS alone."""

from deploykit.backends.backend import Backend
from deploykit.backends.coreml.package import PACKAGE, SYSTEMS

BACKEND = Backend(
    name="coreml",
    package=PACKAGE,
    precisions=("fp32", "fp16", "int8"),
    int8_float_dtypes=("fp32", "fp16"),
    version_rule="same_or_newer",
    uses_cpu=False,
    source="torch",
    systems=SYSTEMS,
    devices="deploykit.backends.coreml.adapter:CoreMLRuntime.devices",
    adapter="deploykit.backends.coreml.adapter:CoreMLRuntime",
    dialect="deploykit.backends.coreml.passes:DIALECT",
    lower="deploykit.backends.coreml.lower:lower",
    inspect="deploykit.backends.coreml.inspect:left_in_float",
)
