"""What ONNX Runtime's optimized graph of an engine still computes in float, or converts."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from deploykit.backends.onnxruntime.session import ort_session
from deploykit.optional import require
from deploykit.places import scratch_folder

_CONVERSIONS = ("QuantizeLinear", "DequantizeLinear")
_WEIGHTED = ("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul")


def left_in_float(engine: Path) -> dict[str, int]:
    """Count conversions, and the weighted nodes that run in float, by operator."""
    with scratch_folder("optimized") as folder:
        optimized = folder / "optimized.onnx"
        ort_session(engine, optimized_to=optimized)
        graph = require("onnx").load(optimized, load_external_data=False).graph
    constants = {tensor.name for tensor in graph.initializer}
    found: Counter[str] = Counter()
    for node in graph.node:
        if node.op_type in _CONVERSIONS:
            found[node.op_type] += 1
        elif node.op_type in _WEIGHTED:
            found[f"float {node.op_type}"] += len(node.input) > 1 and node.input[1] in constants
    return {operator: count for operator, count in sorted(found.items()) if count}
