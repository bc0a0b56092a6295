from __future__ import annotations

from collections import Counter

import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from deploykit.backends.openvino.flatten_layernorm import flatten_layernorm
from tests.fusion.graphs import DYNAMIC, SPEC, layer_norm
from tests.fusion.onnx_graphs import counts, fewer, graph_of, is_left_alone, rewritten


@fewer
@given(
    spec=st.sampled_from([SPEC, DYNAMIC]),
    eps=st.sampled_from([1e-6, 1e-3]),
    affine=st.booleans(),
    seed=st.integers(0, 9),
)
def test_a_norm_over_maps_sees_tokens(spec, eps, affine, seed):
    norm = layer_norm(12, seed, eps=eps, elementwise_affine=affine)
    before = graph_of(lambda m, x: m.norm(x).relu(), spec, norm=norm)
    written, after = rewritten(flatten_layernorm, before)
    assert written == 1
    assert counts(after) == counts(before) + Counter(Reshape=2)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.norm(x.flatten(1, 2)).relu(),
        lambda m, x: nn.functional.layer_norm(x, (12, 12)).relu(),
        lambda m, x: m.norm(x),
    ],
    ids=["three axes", "over two axes", "is the output"],
)
def test_near_misses_are_left_alone(function):
    assert is_left_alone(flatten_layernorm, graph_of(function, norm=layer_norm(12)))


def test_a_norm_that_is_quantized_is_left_alone():
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 21]>
        quantized (float[1, 4, 4, 8] x) => (float[1, 4, 4, 8] y)
        <float[8] weight = {1, 1, 1, 1, 1, 1, 1, 1}, float scale = {0.1}, uint8 zero = {128}> {
            normed = LayerNormalization(x, weight)
            integers = QuantizeLinear(normed, scale, zero)
            y = DequantizeLinear(integers, scale, zero)
        }"""
    )
    assert flatten_layernorm(ir.from_proto(onnx.shape_inference.infer_shapes(model))) == 0
