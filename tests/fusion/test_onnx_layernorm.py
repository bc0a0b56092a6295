from __future__ import annotations

from collections import Counter

import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from deploykit.export.to_onnx import to_onnx
from deploykit.fusion.onnx_layernorm import flatten_layernorm
from deploykit.fusion.onnx_passes import OnnxPass, run_onnx_passes
from deploykit.fusion.pipeline import EXACT_DB
from deploykit.fusion.program import export_program
from tests.fusion.graphs import DYNAMIC, SPEC, Calls, few, images, layer_norm

PASSES = (OnnxPass(name="it", rewrite=flatten_layernorm, min_sqnr_db=EXACT_DB),)


def run(function, spec=DYNAMIC, **parts) -> tuple[int, onnx.ModelProto, onnx.ModelProto]:
    """How many norms the pass rewrote in a network, and its graph before and after."""
    before = to_onnx(export_program(Calls(function, **parts).eval(), spec), spec, ["logits"])
    count = spec.batch if isinstance(spec.batch, int) else 2
    after, (record,) = run_onnx_passes(before, images(count=count).numpy(), PASSES)
    return record.rewrites, before, after


def counts(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


@few
@given(
    spec=st.sampled_from([SPEC, DYNAMIC]),
    eps=st.sampled_from([1e-6, 1e-3]),
    affine=st.booleans(),
    seed=st.integers(0, 9),
)
def test_a_norm_over_maps_sees_tokens(spec, eps, affine, seed):
    norm = layer_norm(12, seed, eps=eps, elementwise_affine=affine)
    written, before, after = run(lambda m, x: m.norm(x).relu(), spec, norm=norm)
    assert written == 1
    assert counts(after) == counts(before) + Counter(Reshape=2)
    assert [value.type for value in before.graph.output] == [value.type for value in after.graph.output]
    onnx.checker.check_model(after)


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
    written, before, after = run(function, norm=layer_norm(12))
    assert written == 0
    assert after is before


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
