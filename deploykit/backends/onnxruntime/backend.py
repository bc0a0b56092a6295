"""ONNX Runtime: ONNX files, on the CPU and on the execution providers that its build carries."""

from deploykit.backends.backend import Backend
from deploykit.backends.onnxruntime.package import PACKAGE
from deploykit.processor import PROCESSOR_TARGETS

BACKEND = Backend(
    name="onnxruntime",
    package=PACKAGE,
    precisions=("fp32", "fp16", "int8"),
    version_rule="same_or_newer",
    image_sizes=True,
    least_version="deploykit.backends.onnxruntime.needs:least_version",
    targets=tuple(PROCESSOR_TARGETS),
    open_options=("arena_extend_strategy", "cudnn_conv_algo_search", "gpu_mem_limit"),
    tunable=("threads", "streams", "in_flight"),
    devices="deploykit.backends.onnxruntime.adapter:OnnxRuntime.devices",
    accelerators={"qnn": "deploykit.backends.onnxruntime.qnn.backend:BACKEND"},
    adapter="deploykit.backends.onnxruntime.adapter:OnnxRuntime",
    dialect="deploykit.backends.onnxruntime.passes:DIALECT",
    lower="deploykit.backends.onnxruntime.lower:lower",
    inspect="deploykit.backends.onnxruntime.inspect:left_in_float",
    profile="deploykit.backends.onnxruntime.profile:integer_savings",
    serving="deploykit.backends.onnxruntime.serving:SERVING",
    debug="deploykit.backends.onnxruntime.debug:find_problem",
    run_part="deploykit.backends.onnxruntime.debug:run_part",
    reducible=True,
    demo=("int8",),
)
