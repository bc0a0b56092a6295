"""OpenVINO: its IR, on the CPU, GPUs and NPUs that it has a plugin for."""

from deploykit.backends.backend import Backend
from deploykit.backends.openvino.package import PACKAGE
from deploykit.processor import PROCESSOR_TARGETS

BACKEND = Backend(
    name="openvino",
    package=PACKAGE,
    precisions=("fp32", "fp16", "bf16", "int8"),
    version_rule="same_or_newer",
    image_sizes=True,
    least_version="deploykit.backends.openvino.needs:least_version",
    targets=tuple(PROCESSOR_TARGETS),
    open_options=("NPU_TURBO", "NUM_STREAMS", "SCHEDULING_CORE_TYPE"),
    tunable=("threads", "streams", "in_flight"),
    devices="deploykit.backends.openvino.adapter:OpenVINORuntime.devices",
    adapter="deploykit.backends.openvino.adapter:OpenVINORuntime",
    dialect="deploykit.backends.openvino.passes:DIALECT",
    lower="deploykit.backends.openvino.lower:lower",
    inspect="deploykit.backends.openvino.inspect:left_in_float",
    serving="deploykit.backends.openvino.serving:SERVING",
    debug="deploykit.backends.openvino.debug:find_problem",
    run_part="deploykit.backends.openvino.debug:run_part",
    demo=("int8", "fp16"),
)
