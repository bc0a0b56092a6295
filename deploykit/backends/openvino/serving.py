"""How Triton and OpenVINO Model Server open an IR."""

from deploykit.backends.backend import Serving
from deploykit.manifest import Manifest


def plugin_config(manifest: Manifest) -> dict[str, str]:
    """Return what OpenVINO is told when a model is compiled: the inference precision is that of the graph."""
    precision = "bf16" if manifest.precision == "bf16" else "f32"
    return {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "THROUGHPUT"}


SERVING = Serving(
    triton_backend="openvino",
    model_server="deploykit.backends.openvino.serving:plugin_config",
    notes=dict.fromkeys(
        ("fp32", "fp16", "int8"),
        "On a processor with BF16 OpenVINO computes float layers in BF16 unless its inference precision is set, for "
        "which Triton's backend documents no parameter: compare the answers there with those of `deploykit run`.",
    ),
)
