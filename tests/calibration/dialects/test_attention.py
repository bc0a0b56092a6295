from __future__ import annotations

from collections import Counter

import onnx

from deploykit.calibration.dialects.onnxruntime import render
from tests.calibration.networks import rounding_noise_db


def test_attention_over_an_integer_projection_is_one_operator(tokens):
    model = render(tokens.graph, tokens.plan).model
    onnx.checker.check_model(model, full_check=True)
    kinds = Counter(node.op_type for node in model.graph.node)
    assert kinds["QAttention"] == 2
    assert not {"Softmax", "Split"} & set(kinds)
    projections = {node.input[1] for node in model.graph.node if node.op_type == "QAttention"}
    assert projections <= {
        tensor.name for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.INT8
    }
    assert min(rounding_noise_db(tokens.run(), tokens.run(model))) > 25
