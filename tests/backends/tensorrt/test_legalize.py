"""Every form of FACTS: what the linter does with it, and what the real parser of TensorRT-RTX does."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploykit.errors import ExportError

pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")

from deploykit.backends.tensorrt.builder import quantize_layers as network_layers
from deploykit.backends.tensorrt.legalize import check_quantization, prepare, quantize_layers, rewrite
from deploykit.onnx_session import onnx_session
from tests.backends.tensorrt.forms import (
    SIDE,
    WEIGHT_INTEGERS,
    Parsed,
    activation,
    integer_operator,
    outputs_of,
    weight,
)

ZEROS = np.zeros(8, np.int8)
UNSIGNED_WEIGHT = weight((WEIGHT_INTEGERS.astype(np.int16) + 128).astype(np.uint8), np.full(8, 128, np.uint8))


def images(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(1, 3, SIDE, SIDE)).astype(np.float32)


def layers_of(parsed: Parsed) -> dict[str, int]:
    import tensorrt_rtx

    return network_layers(tensorrt_rtx, parsed.network)


def noise_db(expected: np.ndarray, found: np.ndarray) -> float:
    noise = np.square(expected.astype(np.float64) - found).sum()
    return float(10 * np.log10(np.square(expected.astype(np.float64)).sum() / max(noise, 1e-30)))


REFUSED = {
    "int8, zero point 3": (activation(np.int8(3)), "quantize_input: the zero point is not 0", "quantize_input"),
    "uint8, zero point 128": (activation(np.uint8(128)), "quantize_input: .*UINT8.*int8", "quantize_input"),
    "int16": (activation(np.int16(0)), "quantize_input: .*INT16; calibrate to 8 bits", ""),
    "uint16": (activation(np.uint16(0)), "quantize_input: .*UINT16; calibrate to 8 bits", ""),
    "uint8 weight": (UNSIGNED_WEIGHT, "dequantize_weight: .*of a weight is not INT8 but UINT8", "dequantize_weight"),
    "weight with zero point 3": (
        weight(WEIGHT_INTEGERS, np.full(8, 3, np.int8)),
        "dequantize_weight: the zero point is not 0",
        "dequantize_weight",
    ),
    **{
        operator: (integer_operator(operator), f"{operator} the_operator: the operator is refused", "the_operator")
        for operator in ("QLinearConv", "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear")
    },
}


@pytest.mark.parametrize("form", REFUSED)
def test_the_linter_names_the_node_of_a_refused_form_and_the_remedy(form):
    model, message, _ = REFUSED[form]
    with pytest.raises(ExportError, match=message):
        prepare(model)


@pytest.mark.parametrize("form", REFUSED)
def test_the_parser_refuses_it_too(form):
    model, _, node = REFUSED[form]
    parsed = Parsed(model)
    assert not parsed.accepted
    assert parsed.refused_nodes == [node]


def test_the_parser_reads_uint8_as_int8_with_a_warning_alone():
    parsed = Parsed(activation(np.uint8(0)))
    assert parsed.accepted
    assert "Defaulting to INT8" in parsed.warnings[0]
    assert layers_of(parsed) == {"QuantizeLinear INT8": 1, "DequantizeLinear INT8": 1}


def test_the_parser_reads_an_absent_zero_point_as_int8_without_a_word():
    parsed = Parsed(activation(None))
    assert parsed.accepted
    assert parsed.warnings == []
    assert layers_of(parsed) == {"QuantizeLinear INT8": 1, "DequantizeLinear INT8": 1}
    assert quantize_layers(activation(None)) == {"QuantizeLinear UINT8": 1, "DequantizeLinear UINT8": 1}


def test_the_parser_refuses_an_int32_bias_behind_a_dequantizelinear():
    parsed = Parsed(weight(WEIGHT_INTEGERS, ZEROS, bias=True))
    assert not parsed.accepted
    assert parsed.refused_nodes == ["dequantize_bias"]


REWRITTEN = {
    "uint8 behind Relu": activation(np.uint8(0)),
    "uint8 without Relu": activation(np.uint8(0), relu=False),
    "no zero point": activation(None),
    "no zero point, without Relu": activation(None, relu=False),
    "no zero point, int8 written": activation(None, output_dtype=TensorProto.INT8),
    "weight without zero point": weight(WEIGHT_INTEGERS, None),
    "int32 bias": weight(WEIGHT_INTEGERS, ZEROS, bias=True),
}


@pytest.mark.parametrize("form", REWRITTEN)
def test_a_rewritten_form_is_read_by_the_parser_as_it_is_written(form):
    model = prepare(REWRITTEN[form])
    onnx.checker.check_model(model, full_check=True)
    parsed = Parsed(model)
    assert parsed.accepted, parsed.complaints
    assert parsed.warnings == []
    assert layers_of(parsed) == quantize_layers(model)


@pytest.mark.parametrize("form", REWRITTEN)
def test_a_rewritten_form_computes_what_it_did(form):
    # 255 levels became 127, so a step more of rounding is all that may differ: the bias and zero points are exact.
    expected = outputs_of(REWRITTEN[form], images())
    found = outputs_of(prepare(REWRITTEN[form]), images())
    exact = form in ("no zero point, int8 written", "weight without zero point", "int32 bias")
    assert noise_db(expected, found) > (100 if exact else 35)


def test_the_relu_that_uint8_did_by_itself_is_written_only_where_it_is_absent():
    relus = [
        sum(node.op_type == "Relu" for node in prepare(activation(np.uint8(0), relu=relu)).graph.node)
        for relu in (True, False)
    ]
    assert relus == [1, 1]


def test_stale_shapes_and_types_are_cleared_and_the_model_given_stays_as_it_was():
    model = activation(np.uint8(0))
    model.graph.value_info.append(helper.make_tensor_value_info("q", TensorProto.UINT8, [1, 3, SIDE, SIDE]))
    before = model.SerializeToString()
    assert not rewrite(model).graph.value_info
    assert model.SerializeToString() == before


def test_every_fault_is_listed():
    model = activation(np.int16(0))
    model.graph.node[-1].op_type = "QLinearMatMul"
    with pytest.raises(ExportError) as caught:
        check_quantization(model)
    assert str(caught.value).count("\n  ") == 3


def test_uint8_that_something_else_reads_is_refused():
    model = activation(np.uint8(0))
    model.graph.node.insert(2, helper.make_node("MaxPool", ["q"], ["pooled"], kernel_shape=[1, 1]))
    model.graph.node[3].input[0] = "pooled"
    with pytest.raises(ExportError, match=r"quantize_input: .*UINT8"):
        prepare(model)


PAIR = "q = QuantizeLinear (a, {scale}, z)  d = DequantizeLinear (q, {scale}, z)  y = Relu (d)"


def small(body: str) -> onnx.ModelProto:
    """A graph over vectors, written out."""
    constants = """float s = {0.02}, uint8 z = {0}, float low = {0}, float under = {-1}, float high = {6},
        int32[3] b = {5, -7, 9}, int32 bz = {0}, float bs = {0.5}, int8 none = {0}"""
    return onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 21]> g (float[1, 3] x) => (float[1, 3] y) <{constants}> {{ {body} }}"""
    )


@pytest.mark.parametrize(
    ("before", "relus"),
    [
        ("a = Clip (x, low, high)", 1),
        ("a = Clip (x, under, high)", 2),
        ("a = Clip (x)", 2),
        ("p = Neg (low)  a = Clip (x, p, high)", 2),
    ],
    ids=["from zero", "from below zero", "without an end", "from a computed end"],
)
def test_a_clip_that_may_give_negative_numbers_is_followed_by_a_relu(before, relus):
    """Which uint8 was by itself, and int8 is not."""
    model = small(f"{before}  {PAIR.format(scale='s')}")
    found = prepare(model)
    assert sum(node.op_type == "Relu" for node in found.graph.node) == relus
    images = np.array([[-3, 0.5, 2]], np.float32)
    (expected,), (ours,) = (onnx_session(ir.from_proto(each)).run(None, {"x": images}) for each in (model, found))
    np.testing.assert_allclose(ours, expected, atol=0.04)


def test_scales_may_stand_in_constant_nodes():
    model = small(f"t = Constant <value = float {{0.02}}> ()  a = Relu (x)  {PAIR.format(scale='t')}")
    assert quantize_layers(prepare(model)) == {"QuantizeLinear INT8": 1, "DequantizeLinear INT8": 1}


def test_a_bias_with_one_scale_becomes_floats():
    found = prepare(small("f = DequantizeLinear (b, bs, bz)  y = Add (x, f)"))
    (bias,) = [numpy_helper.to_array(each) for each in found.graph.initializer]
    np.testing.assert_array_equal(bias, np.array([2.5, -3.5, 4.5], np.float32))
    assert [node.op_type for node in found.graph.node] == ["Add"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("q = QuantizeLinear (x, s, none)  p = Identity (q)  y = DequantizeLinear (p, s)", "no zero point is written"),
        ("n = Identity (none)  q = QuantizeLinear (x, s, n)  y = DequantizeLinear (q, s, n)", "zero point is computed"),
        ("t = Abs (s)  q = QuantizeLinear (x, t)  y = DequantizeLinear (q, t)", "no zero point is written"),
    ],
    ids=["of passed on integers", "computed", "beside a computed scale"],
)
def test_a_zero_point_that_cannot_be_written_or_read_is_named(body, message):
    with pytest.raises(ExportError, match=message):
        prepare(small(body))
