"""TensorRT: plans for NVIDIA GPUs, by TensorRT-RTX or full TensorRT, whichever is installed."""

from deploykit.backends.backend import Backend
from deploykit.backends.tensorrt.api import FLAVOURS, PACKAGES, default_flavour
from deploykit.backends.tensorrt.targets import TARGETS
from deploykit.errors import SpecError
from deploykit.optional import OptionalPackage


def _package() -> OptionalPackage:
    """Return the package to use here; a wrong name in the environment is refused where TensorRT is used."""
    try:
        return PACKAGES[default_flavour()]
    except SpecError:
        return PACKAGES[FLAVOURS[0]]


BACKEND = Backend(
    name="tensorrt",
    package=_package(),
    precisions=("fp32", "fp16", "int8"),
    image_sizes=True,
    int8_float_dtypes=("fp32", "fp16"),
    uses_cpu=False,
    targets=TARGETS,
    devices="deploykit.backends.tensorrt.adapter:TensorRTRuntime.devices",
    tie="deploykit.backends.tensorrt.cuda_driver:machine_tie",
    adapter="deploykit.backends.tensorrt.adapter:TensorRTRuntime",
    dialect="deploykit.backends.tensorrt.passes:DIALECT",
    code_suffix=".plan",
    lower="deploykit.backends.tensorrt.lower:lower",
    portable="deploykit.backends.tensorrt.lower:lower_portable",
    options="deploykit.backends.tensorrt.api:check_build_options",
    serving="deploykit.backends.tensorrt.serving:SERVING",
    debug="deploykit.backends.tensorrt.debug:find_problem",
    reducible=True,
    demo=("int8",),
)
