"""Quantized graphs with their activations in float: what takes the place of each quantizer."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from deploykit.errors import SpecError
from deploykit.export.float_activations import without_activation_quantizers
from deploykit.onnx_session import onnx_session

CONSTANTS = """float scale = {0.05}, uint8 middle = {128}, uint8 least = {0}, float[3] scales = {0.05, 0.04, 0.03},
    uint8[3] leasts = {0, 0, 0}, uint8[3, 2] w = {1, 2, 130, 140, 255, 0}, uint8 wz = {128}, float ws = {0.1},
    float[2] bias = {0.5, -0.5}"""


def graph(body: str) -> ir.Model:
    text = f"""<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]> g (float[2, 3] x) => (float[] y)
        <{CONSTANTS}> {{ {body} }}"""
    proto = onnx.parser.parse_model(text)
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    return ir.from_proto(proto)


def images() -> np.ndarray:
    return np.array([[-1, 0.5, 2], [0.25, -3, 1]], np.float32)


def run(model: ir.Model) -> np.ndarray:
    (output,) = onnx_session(model, optimize=False).run(None, {"x": images()})
    return output


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ("scale, middle", lambda x: 2 * x),
        ("scale, least", lambda x: 2 * np.maximum(x, 0)),
        ("scale", lambda x: 2 * np.maximum(x, 0)),
        ("scales, leasts", lambda x: 2 * x),
    ],
    ids=["signed", "cut at zero", "cut at zero by default", "a scale for each channel"],
)
def test_a_pair_goes_and_what_it_cuts_off_below_zero_stays_cut(parameters, expected):
    pair = f"q = QuantizeLinear <axis = 1> (x, {parameters})  d = DequantizeLinear <axis = 1> (q, {parameters})"
    model = graph(f"{pair}  y = Add (d, d)")
    whole = without_activation_quantizers(model)
    np.testing.assert_allclose(run(whole), expected(images()), rtol=1e-6)
    assert sum(node.op_type == "QuantizeLinear" for node in model.graph) == 1, "the graph that was given stays"


DYNAMIC = "q, s, z = DynamicQuantizeLinear (x)"
WEIGHT = np.array([[1, 2], [130, 140], [255, 0]], np.float32)
PRODUCTS = {
    "integers": (f"{DYNAMIC}  i = MatMulInteger (q, w, z, wz)  f = Cast <to = 1> (i)  y = Mul (f, s)", 128, 1),
    "without a zero point": (f"{DYNAMIC}  i = MatMulInteger (q, w, z)  f = Cast <to = 1> (i)  y = Mul (f, s)", 0, 1),
    "floats": (f"{DYNAMIC}  y = com.microsoft.MatMulIntegerToFloat (q, w, s, ws, z, wz, bias)", 128, 0.1),
    "floats without a bias": (f"{DYNAMIC}  y = com.microsoft.MatMulIntegerToFloat (q, w, s, ws, z, wz)", 128, 0.1),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_that_quantizes_at_each_call_takes_floats(name):
    body, zero, step = PRODUCTS[name]
    whole = without_activation_quantizers(graph(body))
    bias = np.array([0.5, -0.5]) if name == "floats" else 0
    np.testing.assert_allclose(run(whole), images() @ ((WEIGHT - zero) * step) + bias, rtol=1e-5)


@pytest.mark.parametrize(
    "body",
    [
        f"{DYNAMIC}  w2 = Cast <to = 2> (x)  t = Transpose (w2)  i = MatMulInteger (q, t, z)  y = Cast <to = 1> (i)",
        f"{DYNAMIC}  t = Transpose (q)  y = com.microsoft.MatMulIntegerToFloat (q, t, s, ws, z)",
        f"{DYNAMIC}  y = com.microsoft.MatMulIntegerToFloat (q, w, s, s, z)",
        "y = Add (x, x)",
    ],
    ids=["of two activations", "of an activation with itself", "a scale of the images", "nothing quantized"],
)
def test_a_graph_without_quantized_activations_before_constant_weights_is_refused(body):
    with pytest.raises(SpecError, match=r"the engine quantizes no activations, so there is nothing to compare"):
        without_activation_quantizers(graph(body))
