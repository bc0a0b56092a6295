from __future__ import annotations

from deploykit.backends.backend import LowerOptions
from deploykit.backends.openvino.inspect import left_in_float
from deploykit.backends.openvino.lower import lower
from deploykit.backends.openvino.passes import DIALECT


def test_what_is_left_in_float_is_read_from_openvinos_compiled_graph(residual, tmp_path):
    def left(plan) -> dict[str, int]:
        graph = DIALECT.render(residual.graph, plan, residual.images).graph
        return left_in_float(tmp_path / lower(graph, tmp_path, LowerOptions()).file)

    in_float, quantized = left(None), left(residual.plan)
    assert in_float == {"float Convolution": 9, "float FullyConnected": 1}
    assert quantized == {"float Convolution": 2}
    nodes = list(residual.plan.placement.weights)[2:4]
    mixed = left(residual.plan.without(residual.graph.model, dict.fromkeys(nodes, "because")))
    assert mixed["float Convolution"] == 4
