from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from deploykit.backends.onnxruntime.fuse_linear import fuse_linear
from tests.fusion.graphs import DYNAMIC, SPEC
from tests.fusion.onnx_graphs import counts, fewer, graph_of, is_left_alone, rewritten


def run(function, spec=DYNAMIC, **parts):
    before = graph_of(function, spec, **parts)
    written, after = rewritten(fuse_linear, before)
    return written, before, after


@fewer
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
    assert is_left_alone(fuse_linear, graph_of(function, layer=nn.Linear(144, 6)))


def test_a_product_that_is_read_twice_is_left_alone():
    layer = nn.Linear(144, 6)
    written, _, _ = run(
        lambda m, x: (p := nn.functional.linear(x.flatten(2), m.layer.weight)) * (p + m.layer.bias).relu(), layer=layer
    )
    assert written == 0
