"""ExecuTorch: .pte files, on the CPU through its XNNPACK delegate."""

from deploykit.backends.backend import Backend
from deploykit.backends.executorch.package import PACKAGE

BACKEND = Backend(
    name="executorch",
    package=PACKAGE,
    precisions=("fp32", "int8"),
    version_rule="same_or_newer",
    source="torch",
    devices="deploykit.backends.executorch.adapter:ExecuTorchRuntime.devices",
    adapter="deploykit.backends.executorch.adapter:ExecuTorchRuntime",
    dialect="deploykit.backends.executorch.passes:DIALECT",
    lower="deploykit.backends.executorch.lower:lower",
    inspect="deploykit.backends.executorch.inspect:left_in_float",
)
