from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from deploykit.calibration.dialects.tensorrt import render
from deploykit.export.graphs import select
from deploykit.export.tensorrt_linter import check_quantization
from deploykit.export.to_tensorrt import to_tensorrt
from tests.calibration.networks import rounding_noise_db


def test_every_zero_point_is_a_written_signed_zero(case):
    model = render(case.graph, case.plan).model
    check_quantization(model)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    pairs = [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert len(pairs) > 20
    for node in pairs:
        zero = constants[node.input[2]]
        assert zero.data_type == onnx.TensorProto.INT8
        assert not numpy_helper.to_array(zero).any()


def test_biases_stay_in_float_and_no_activation_is_dropped(case):
    model = render(case.graph, case.plan).model
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    assert all(constants[node.input[2]].data_type == onnx.TensorProto.FLOAT for node in convolutions)
    before, after = (
        Counter(node.op_type for node in graph.graph.node if node.op_type in ("Relu", "Clip"))
        for graph in (case.graph.model, model)
    )
    assert after == before
    assert before.total() > 4


def test_the_numbers_stay_near_fp32(case):
    found = case.run(render(case.graph, case.plan).model)
    assert min(rounding_noise_db(case.run(), found)) > 10
    assert all(np.isfinite(output).all() for output in found)


def test_a_plan_is_built_from_it(residual, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    graph = select(render(residual.graph, residual.plan), ["stage2", "logits"])
    engine = to_tensorrt(graph, tmp_path)
    assert (tmp_path / engine.file).stat().st_size > 10_000
