from __future__ import annotations

from collections import Counter
from itertools import pairwise

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from deploykit.export.to_onnx import to_onnx
from deploykit.fusion.onnx_linear import fuse_onnxruntime_linear
from deploykit.fusion.onnx_passes import OnnxPass, run_onnx_passes
from deploykit.fusion.pipeline import EXACT_DB
from deploykit.fusion.program import export_program
from tests.fusion.graphs import DYNAMIC, SPEC, Calls, few, images

PASSES = (OnnxPass(name="it", rewrite=fuse_onnxruntime_linear, min_sqnr_db=EXACT_DB),)


def run(function, spec=DYNAMIC, **parts) -> tuple[int, onnx.ModelProto, onnx.ModelProto]:
    """How many layers the pass wrote in a network, and its graph before and after."""
    before = to_onnx(export_program(Calls(function, **parts).eval(), spec), spec, ["logits"])
    count = spec.batch if isinstance(spec.batch, int) else 2
    after, (record,) = run_onnx_passes(before, images(count=count).numpy(), PASSES)
    return record.rewrites, before, after


def counts(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


@few
@given(
    spec=st.sampled_from([SPEC, DYNAMIC]),
    channels=st.sampled_from([1, 5, 144]),
    maps=st.booleans(),
    layers=st.integers(1, 3),
)
def test_layers_over_tokens_and_maps_become_one_operator(spec, channels, maps, layers):
    sides = [12 if maps else 144, *[channels] * layers]
    stack = nn.Sequential(*(nn.Sequential(nn.Linear(one, two), nn.GELU()) for one, two in pairwise(sides)))
    written, _, after = run(lambda m, x: m.stack(x if maps else x.flatten(2)), spec, stack=stack)
    assert written == layers
    assert counts(after)["Gemm"] == layers
    assert not {"MatMul", "Add"} & set(counts(after))
    onnx.checker.check_model(after)


def test_the_shape_of_any_batch_stays():
    _, before, after = run(lambda m, x: m.layer(x).relu(), layer=nn.Linear(12, 5))
    assert [value.type for value in before.graph.output] == [value.type for value in after.graph.output]


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: (m.layer.weight @ x.flatten(2).mT).relu(),
        lambda m, x: (x.flatten(2) @ x.flatten(2).mT + m.layer.bias[:4]).relu(),
        lambda m, x: nn.functional.linear(x.flatten(2), m.layer.weight).relu(),
        lambda m, x: m.layer(x.flatten(1)[:, :144]).relu(),
        lambda m, x: m.layer(x.flatten(2)),
    ],
    ids=["weight in front", "no constant", "no bias", "two axes", "is the output"],
)
def test_near_misses_are_left_alone(function):
    written, before, after = run(function, layer=nn.Linear(144, 6))
    assert written == 0
    assert after is before


def test_a_product_that_is_read_twice_is_left_alone():
    layer = nn.Linear(144, 6)
    written, _, _ = run(
        lambda m, x: (p := nn.functional.linear(x.flatten(2), m.layer.weight)) * (p + m.layer.bias).relu(), layer=layer
    )
    assert written == 0
