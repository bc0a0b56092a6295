from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from deploykit.fusion.resize_by_matrix import resize_by_matrix
from deploykit.spec import InputSpec, SizeRange
from tests.fusion.graphs import Calls, calls, check_with_dynamic_batch, few, is_left_alone, rewrites, targets, traced

interpolate = nn.functional.interpolate


@few
@given(
    mode=st.sampled_from(["bilinear", "bicubic"]),
    height=st.integers(1, 20),
    width=st.integers(2, 20),
    aligned=st.booleans(),
)
def test_a_resize_to_a_size_becomes_two_products(mode, height, width, aligned):
    settings = {"size": (height, width), "mode": mode, "antialias": True, "align_corners": aligned}
    graph = traced(Calls(lambda m, x: interpolate(m.conv(x), **settings), conv=nn.Conv2d(4, 3, 1)))
    assert rewrites(graph, resize_by_matrix) == 1
    assert calls(graph, "matmul") == 2


@pytest.mark.parametrize("factor", [0.3, (0.3, 1.7), 2.5])
@pytest.mark.parametrize("recomputed", [False, True])
def test_the_factors_that_a_resize_is_given_count(factor, recomputed):
    settings = {"scale_factor": factor, "recompute_scale_factor": recomputed, "mode": "bilinear", "antialias": True}
    assert rewrites(traced(Calls(lambda m, x: interpolate(x, **settings))), resize_by_matrix) == 1


def test_a_graph_of_any_batch_is_still_traced():
    network = Calls(lambda m, x: m.conv(interpolate(x, size=(5, 7), mode="bilinear", antialias=True)))
    network.conv = nn.Conv2d(4, 8, 3)
    check_with_dynamic_batch(network, resize_by_matrix)


def test_a_plain_resize_and_one_to_a_column_are_left_alone():
    column = Calls(lambda m, x: interpolate(x, size=(5, 1), mode="bilinear", antialias=True))
    assert is_left_alone(column, resize_by_matrix)
    assert is_left_alone(Calls(lambda m, x: interpolate(x, size=(5, 7), mode="bilinear")), resize_by_matrix)


def test_maps_whose_sides_are_not_known_keep_their_resize():
    sizes = SizeRange(min=8, opt=16, max=32, step=2)
    spec = InputSpec(channels=4, height=16, width=16, sizes=sizes)
    graph = traced(Calls(lambda m, x: interpolate(x, size=(5, 7), mode="bilinear", antialias=True)), spec)
    before = targets(graph)
    assert resize_by_matrix(graph) == 0
    assert targets(graph) == before
