from __future__ import annotations

import pytest

from deploykit.backends.onnxruntime.passes import DIALECT
from deploykit.backends.onnxruntime.profile import integer_savings, kernel_times
from tests.calibration.networks import written


@pytest.mark.parametrize("name", ["residual", "tokens", "windows"])
def test_onnx_runtime_names_the_time_of_every_integer_node(request, name):
    case = request.getfixturevalue(name)
    quantized = written(DIALECT, case.graph, case.plan)
    savings = integer_savings(case.graph.model, quantized, case.plan.placement.weights, case.images[:1])
    assert savings is not None
    assert savings.keys() == case.plan.placement.weights.keys()
    assert all(value > 0 for value in savings.values())
    assert sum(kernel_times(case.graph.model, case.images[:1]).values()) > sum(savings.values()) / 1000


def test_a_node_that_no_profile_names_leaves_the_times_out(residual):
    quantized = written(DIALECT, residual.graph, residual.plan)
    node = next(iter(residual.plan.placement.weights))
    assert integer_savings(residual.graph.model, quantized, [node, "fused away"], residual.images[:1]) is None
