"""What OpenVINO's compiled graph of an engine still rounds by itself, or computes in float."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from deploykit.backends.openvino.package import load_openvino
from deploykit.backends.openvino.protocols import Output

_PRODUCTS = ("Convolution", "GroupConvolution", "FullyConnected", "MatMul")


def left_in_float(engine: Path) -> dict[str, int]:
    """Count roundings, and the weighted nodes that run in float, by operator."""
    core = load_openvino().Core()
    compiled = core.compile_model(core.read_model(str(engine)), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found: Counter[str] = Counter()
    for node in compiled.get_runtime_model().get_ordered_ops():
        kind, precision = (str(node.get_rt_info()[key].astype(str)) for key in ("layerType", "runtimePrecision"))
        if kind == "FakeQuantize":
            found[kind] += 1
        elif kind in _PRODUCTS and precision not in ("i8", "u8"):
            found[f"float {kind}"] += _is_constant(node.input_value(1))
    return {operator: count for operator, count in sorted(found.items()) if count}


def _is_constant(value: Output) -> bool:
    return str(value.get_node().get_rt_info()["layerType"].astype(str)) == "Const"
