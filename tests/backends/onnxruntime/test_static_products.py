"""Classifiers of imported plans, which have one range for all calls."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnxruntime.quantization import QuantType

from deploykit.backends.onnxruntime.passes import DIALECT
from deploykit.backends.onnxruntime.session import ort_session
from deploykit.export.import_quantized import import_quantized
from tests.export.quantized_models import images, network, quantize_static


def as_matmul(model):
    """The same classifier as a MatMul and an Add, which ONNX Runtime makes a Gemm of."""
    gemm = model.graph.node.pop()
    source, weight, bias = gemm.input
    (stored,) = [each for each in model.graph.initializer if each.name == weight]
    stored.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(numpy_helper.to_array(stored).T), weight))
    product, added = helper.make_node("MatMul", [source, weight], ["product"], "fc"), ["product", bias]
    model.graph.node.extend([product, helper.make_node("Add", added, gemm.output, "fc.add")])
    return model


@pytest.mark.parametrize("form", [lambda model: model, as_matmul], ids=["gemm", "matmul"])
def test_no_classifier_dequantizes_its_weight_at_each_call(tmp_path, form):
    options = {"per_channel": True, "activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    options["extra_options"] = {"OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul", "Add"]}
    found = import_quantized(quantize_static(tmp_path, form(network()), **options))
    graph = DIALECT.render(found.master, found.plan, images()).graph
    (product,) = [node for node in graph.model.graph if node.op_type == "MatMulInteger"]
    assert product.inputs[0].producer().op_type == "QuantizeLinear"  # in the range that the model came with
    ort_session(graph.model, optimized_to=tmp_path / "optimized.onnx")
    optimized = onnx.load(tmp_path / "optimized.onnx").graph
    weights = {value.name for value in optimized.initializer if "fc" in value.name}
    assert weights
    assert not [node for node in optimized.node if node.op_type == "DequantizeLinear" and node.input[0] in weights]
