from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from deploykit.backends.backend import LowerOptions
from deploykit.backends.tensorrt.legalize import check_quantization
from deploykit.backends.tensorrt.lower import lower
from deploykit.backends.tensorrt.passes import DIALECT
from deploykit.export.graphs import select
from tests.calibration.networks import rounding_noise_db, written


def test_every_zero_point_is_a_written_signed_zero(case):
    model = ir.to_proto(written(DIALECT, case.graph, case.plan))
    check_quantization(model)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    pairs = [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert len(pairs) > 20
    for node in pairs:
        zero = constants[node.input[2]]
        assert zero.data_type == onnx.TensorProto.INT8
        assert not numpy_helper.to_array(zero).any()


def test_biases_stay_in_float_and_no_activation_is_dropped(case):
    model = ir.to_proto(written(DIALECT, case.graph, case.plan))
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    assert all(constants[node.input[2]].data_type == onnx.TensorProto.FLOAT for node in convolutions)
    before, after = (
        Counter(node.op_type for node in graph.graph.node if node.op_type in ("Relu", "Clip"))
        for graph in (ir.to_proto(case.graph.model), model)
    )
    assert after == before
    assert before.total() > 4


def test_the_numbers_stay_near_fp32(case):
    found = case.run(written(DIALECT, case.graph, case.plan))
    assert min(rounding_noise_db(case.run(), found)) > 10
    assert all(np.isfinite(output).all() for output in found)


def test_a_plan_is_built_from_it(residual, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    whole = replace(residual.graph, model=written(DIALECT, residual.graph, residual.plan))
    engine = lower(select(whole, ["stage2", "logits"]), tmp_path, LowerOptions())
    assert (tmp_path / engine.file).stat().st_size > 10_000
