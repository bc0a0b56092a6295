"""Classifiers of imported plans, which have one range for all calls."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper
from onnxruntime.quantization import QuantType

from deploykit.backends.onnxruntime.passes import DIALECT
from deploykit.backends.onnxruntime.session import ort_session
from deploykit.backends.onnxruntime.static_products import _multiply_integers, split_gemm
from deploykit.export.import_quantized import import_quantized
from deploykit.onnx_session import onnx_session
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


CONSTANTS = """uint8 z = {128}, float s = {0.05}, int8 wz = {0}, float ws = {0.1}, int8[3, 2] w = {1, 2, 3, 4, 5, 6},
    float[2] b = {0.5, -0.5}, float[3, 2] real = {1, 2, 3, 4, 5, 6}"""
READ = "q = QuantizeLinear (x, s, z)  d = DequantizeLinear (q, s, z)"
WEIGHT = "r = DequantizeLinear <axis = 0> (w, ws, wz)"


def graph_of(body: str) -> ir.Model:
    text = (
        f"""<ir_version: 10, opset_import: ["" : 21]> g (float[1, 3] x) => (float[1, 2] y) <{CONSTANTS}> {{ {body} }}"""
    )
    model = ir.from_proto(onnx.parser.parse_model(text))
    for place, node in enumerate(model.graph):
        node.name = f"n{place}"
    return model


def run(model: ir.Model) -> np.ndarray:
    (output,) = onnx_session(model, optimize=False).run(None, {"x": np.array([[0.5, -1, 2]], np.float32)})
    return output


@pytest.mark.parametrize("bias", ["", ", b"], ids=["no bias", "bias"])
def test_a_gemm_is_split_into_a_product_and_its_bias_if_it_has_one(bias):
    model = graph_of(f"{READ}  {WEIGHT}  y = Gemm (d, r{bias})")
    expected, gemm = run(model), list(model.graph)[-1]
    assert split_gemm(model.graph, gemm).op_type == "MatMul"
    assert [node.op_type for node in model.graph][3:] == ["MatMul", "Add"][: 2 if bias else 1]
    np.testing.assert_allclose(run(model), expected, rtol=1e-5)


@pytest.mark.parametrize(
    "gemm", ["Gemm <alpha = 0.5> (d, r, b)", "Gemm (d, real, b)", "Gemm <beta = 2.0> (d, r, b)"], ids=str
)
def test_a_gemm_with_factors_or_over_a_float_weight_stays(gemm):
    model = graph_of(f"{READ}  {WEIGHT}  y = {gemm}")
    last = list(model.graph)[-1]
    assert split_gemm(model.graph, last) is last
    _multiply_integers(model.graph, last)
    assert list(model.graph)[-1] is last


@pytest.mark.parametrize(
    "body",
    [f"{WEIGHT}  y = MatMul (x, r)", f"{READ}  y = MatMul (d, real)", f"{WEIGHT}  n = Neg (x)  y = MatMul (n, r)"],
    ids=["of the images", "over a float weight", "of a float activation"],
)
def test_a_product_with_a_float_operand_stays(body):
    model = graph_of(body)
    before = [node.op_type for node in model.graph]
    _multiply_integers(model.graph, list(model.graph)[-1])
    assert [node.op_type for node in model.graph] == before
