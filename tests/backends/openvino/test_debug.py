from __future__ import annotations

import pytest
from torch import nn

from deploykit.backends.openvino.debug import find_problem
from deploykit.backends.openvino.read_error import read_error
from tests.fusion.graphs import SPEC, images
from tests.fusion.onnx_graphs import graph_of

pytest.importorskip("openvino", reason="openvino is not installed")
IMAGES = {"images": images().numpy()}


def test_a_part_that_is_right_has_no_problem():
    assert find_problem(graph_of(lambda m, x: m.conv(x).relu(), SPEC, conv=nn.Conv2d(4, 8, 3)), IMAGES, 80.0) is None


def test_a_part_that_is_refused_says_why_without_file_names():
    part = graph_of(lambda m, x: m.pad(x).relu(), SPEC, pad=nn.CircularPad2d(1))
    problem = find_problem(part, IMAGES, 80.0)
    assert problem is not None
    assert "it refuses it: " in problem
    assert "Unsupported padding mode: [wrap]" in problem
    assert ".cpp" not in problem


def test_an_exception_that_says_nothing_else_keeps_its_type():
    assert read_error(RuntimeError("Exception from src/inference/core.cpp:84:\n")) == "RuntimeError"
