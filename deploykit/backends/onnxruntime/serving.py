"""How Triton opens ONNX files: through its backend of the same name, on the CPU or the GPU."""

from deploykit.backends.backend import Serving

SERVING = Serving(
    triton_backend="onnxruntime",
    notes={
        "int8": "Triton's backend cannot be told to leave float convolutions between quantized layers alone, which "
        "deploykit's sessions are: compare the answers there with those of `deploykit run`."
    },
)
