from __future__ import annotations

from collections import Counter

import onnx
import onnx_ir as ir
import pytest

from deploykit.backends.onnxruntime.passes import DIALECT
from tests.calibration.networks import rounding_noise_db


@pytest.fixture(params=["tokens", "windows"])
def transformer(request):
    return request.getfixturevalue(request.param)


def rendered(case, plan=None) -> ir.Model:
    return DIALECT.render(case.graph, plan or case.plan, case.images).graph.model


def kinds_of(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def test_attention_over_an_integer_projection_is_one_operator(transformer):
    model = rendered(transformer)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    kinds = kinds_of(model)
    assert kinds["Attention"] == 2
    assert kinds["MatMulIntegerToFloat"] == 6
    assert not {"Softmax", "Split"} & set(kinds)
    integers = {value for value in model.graph.initializers.values() if value.dtype == ir.DataType.INT8}
    assert {node.inputs[1] for node in model.graph if node.op_type == "MatMulIntegerToFloat"} <= integers
    assert min(rounding_noise_db(transformer.run(), transformer.run(model))) > 25


def test_windows_are_cut_and_joined_by_one_gather_each(windows):
    kinds = kinds_of(rendered(windows))
    assert kinds["Gather"] == 4
    assert not {"Slice", "Concat"} & set(kinds)


def test_position_biases_stay_with_their_attention(windows):
    model = rendered(windows)
    biases = [node.inputs[3].const_value.numpy().shape for node in model.graph if node.op_type == "Attention"]
    assert biases == [(1, 4, 16, 16), (4, 4, 16, 16)]  # the mask of shifted windows differs from window to window


def test_attention_over_a_float_projection_stays_as_it_is(windows):
    projections = [name for name, use in windows.plan.placement.weights.items() if "qkv" in use.weight]
    assert len(projections) == 2
    plan = windows.plan.without(windows.graph.model, {projections[0]: "asked for"})
    model = rendered(windows, plan)
    kinds = kinds_of(model)
    assert kinds["Attention"] == kinds["Softmax"] == 1
    assert min(rounding_noise_db(windows.run(), windows.run(model))) > 25
