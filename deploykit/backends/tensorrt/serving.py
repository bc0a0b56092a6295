"""How Triton opens plans: through its backend of the same name, which reads those of full TensorRT."""

from deploykit.backends.backend import Serving

SERVING = Serving(
    triton_backend="tensorrt",
    notes=dict.fromkeys(
        ("fp32", "fp16", "int8"),
        "Triton reads plans of full TensorRT in exactly the version that built them, and none of TensorRT-RTX.",
    ),
)
