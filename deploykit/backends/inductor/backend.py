"""torch.compile's ahead-of-time form: AOTInductor packages, machine code for the CPU."""

from deploykit.backends.backend import Backend
from deploykit.backends.inductor.targets import FASTEST_MODE, INDUCTOR_MODES
from deploykit.optional import PACKAGES

BACKEND = Backend(
    name="torch_compile",
    package=PACKAGES["torch"],
    precisions=("fp32", "fp16", "bf16", "int8"),
    targets=(FASTEST_MODE, *INDUCTOR_MODES),
    source="torch",
    devices="deploykit.backends.inductor.adapter:InductorRuntime.devices",
    tie="deploykit.backends.inductor.adapter:machine_tie",
    adapter="deploykit.backends.inductor.adapter:InductorRuntime",
    dialect="deploykit.backends.inductor.passes:DIALECT",
    code_suffix=".pt2",
    lower="deploykit.backends.inductor.lower:lower",
    inspect="deploykit.backends.inductor.inspect:left_in_float",
)
