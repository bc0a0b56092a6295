"""The compiler's own process: an ONNX file -> an ONNX file with the QNN context binary of one SoC.

Qualcomm's library writes to the terminal, and may end its process. Started by
`deploykit.backends.onnxruntime.qnn.lower` as ``python -m deploykit.backends.onnxruntime.qnn.compiler SOC_MODEL
HTP_ARCH``, in the folder of the files: the paths would be in the engine's bytes.
"""

from __future__ import annotations

import sys
from pathlib import Path

from deploykit.backends.onnxruntime.qnn.session import open_session

SOURCE = "source.onnx"
COMPILED = "context.onnx"

REFUSED = 3
"""The exit status where QNN refuses the graph; the file `REASON` has its words."""

REASON = "reason"
TRACE = "trace/qnn_op_trace.json"
"""What QNN writes of what became of each node."""


def compile_context(soc_model: str, htp_arch: str) -> None:
    """Write the context binary of the model `SOURCE`, embedded in the file `COMPILED`."""
    options = {
        "soc_model": soc_model,
        "htp_arch": htp_arch,
        # The NPU has no FP32: float operators compute in FP16.
        "enable_htp_fp16_precision": "1",
        # Otherwise the CPU quantizes the input and restores the outputs.
        "offload_graph_io_quantization": "0",
        "htp_graph_finalization_optimization_mode": "3",
        "enable_framework_op_trace": "1",
        "framework_op_trace_dir": Path(TRACE).parent.name,
    }
    settings = {
        "ep.context_enable": "1",
        "ep.context_embed_mode": "1",
        "ep.context_file_path": COMPILED,
    }
    open_session(SOURCE, options, settings)


def _answer(soc_model: str, htp_arch: str) -> int:
    try:
        compile_context(soc_model, htp_arch)
    except Exception as error:  # onnxruntime's exceptions share no base class but Exception
        Path(REASON).write_text(str(error), encoding="utf-8")
        return REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(_answer(*sys.argv[1:]))
