from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest

from deploykit.backends.backend import LowerOptions
from deploykit.backends.tensorrt.legalize import check_quantization
from deploykit.backends.tensorrt.lower import lower
from deploykit.backends.tensorrt.passes import DIALECT
from deploykit.export.graphs import select
from deploykit.graph import OnnxGraph
from tests.calibration.networks import rounding_noise_db


def rendered(case) -> OnnxGraph:
    return DIALECT.render(case.graph, case.plan, case.images).graph


def test_every_zero_point_is_a_written_signed_zero(case):
    model = rendered(case).model
    check_quantization(ir.to_proto(model))
    pairs = [node for node in model.graph if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert len(pairs) > 20
    for node in pairs:
        zero = node.inputs[2].const_value
        assert zero.dtype == ir.DataType.INT8
        assert not zero.numpy().any()


def test_biases_stay_in_float_and_no_activation_is_dropped(case):
    model = rendered(case).model
    convolutions = [node for node in model.graph if node.op_type == "Conv"]
    assert all(node.inputs[2].const_value.dtype == ir.DataType.FLOAT for node in convolutions)
    before, after = (
        Counter(node.op_type for node in graph.graph if node.op_type in ("Relu", "Clip"))
        for graph in (case.graph.model, model)
    )
    assert after == before
    assert before.total() > 4


def test_the_numbers_stay_near_fp32(case):
    found = case.run(rendered(case).model)
    assert min(rounding_noise_db(case.run(), found)) > 10
    assert all(np.isfinite(output).all() for output in found)


def test_a_plan_is_built_from_it(residual, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    graph = select(rendered(residual), ["stage2", "logits"])
    engine = lower(graph, tmp_path, LowerOptions())
    assert (tmp_path / engine.file).stat().st_size > 10_000
