from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from deploykit.backends.openvino.debug import find_problem
from deploykit.backends.openvino.pad_average_pool import pad_average_pool
from tests.fusion.graphs import DYNAMIC, SPEC, images
from tests.fusion.onnx_graphs import fewer, graph_of, is_left_alone, rewritten

pytest.importorskip("openvino", reason="openvino is not installed")


@fewer
@given(
    spec=st.sampled_from([SPEC, DYNAMIC]),
    pool=st.sampled_from(
        [
            nn.AvgPool2d(3, 2, 1, ceil_mode=True),
            nn.AvgPool2d((3, 5), (2, 3), (1, 2), ceil_mode=True),
            nn.AvgPool2d((5, 2), (4, 2), (2, 0), ceil_mode=True),
        ]
    ),
)
def test_windows_that_hang_over_are_divided_as_onnx_defines(spec, pool):
    before = graph_of(lambda m, x: m.pool(x), spec, pool=pool)
    written, after = rewritten(pad_average_pool, before)
    assert written == 1
    given_images = {"images": images(count=1 if spec is SPEC else 2).numpy()}
    assert find_problem(after, given_images, 80.0) is None


def test_the_runtime_divides_them_otherwise_by_itself():
    before = graph_of(lambda m, x: m.pool(x), SPEC, pool=nn.AvgPool2d(3, 2, 1, ceil_mode=True))
    problem = find_problem(before, {"images": images().numpy()}, 80.0)
    assert problem is not None, "this OpenVINO divides rightly: the pass can go"
    assert "dB in openvino; expected at least 80" in problem


@pytest.mark.parametrize(
    "pool",
    [
        nn.AvgPool2d(3, 2, 1),
        nn.AvgPool2d(2, 2, ceil_mode=True),
        nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
    ],
    ids=["rounded down", "whole windows", "padding does not count"],
)
def test_windows_that_end_within_are_left_alone(pool):
    assert is_left_alone(pad_average_pool, graph_of(lambda m, x: m.pool(x).relu(), pool=pool))
