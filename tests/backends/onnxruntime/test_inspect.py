from __future__ import annotations

from deploykit.backends.backend import LowerOptions
from deploykit.backends.onnxruntime.inspect import left_in_float
from deploykit.backends.onnxruntime.lower import lower
from deploykit.backends.onnxruntime.passes import DIALECT


def test_what_is_left_in_float_is_read_from_the_optimized_graph(residual, tmp_path):
    def left(plan) -> dict[str, int]:
        graph = DIALECT.render(residual.graph, plan, residual.images).graph
        return left_in_float(tmp_path / lower(graph, tmp_path, LowerOptions()).file)

    in_float, quantized = left(None), left(residual.plan)
    assert in_float["float Conv"] == 9
    assert not [operator for operator in in_float if "Quantize" in operator]
    assert "float Conv" not in quantized
    nodes = list(residual.plan.placement.weights)[2:4]
    mixed = left(residual.plan.without(residual.graph.model, dict.fromkeys(nodes, "because")))
    assert mixed["float Conv"] == 2
    assert mixed["DequantizeLinear"] > quantized["DequantizeLinear"]
