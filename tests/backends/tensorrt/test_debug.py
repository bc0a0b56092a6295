"""Which part of a graph TensorRT does not build."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")

from deploykit.backends.tensorrt.debug import find_problem

IMAGES = {"x": np.zeros((1, 8), np.float32)}


def part(body: str) -> ir.Model:
    text = f'<ir_version: 10, opset_import: ["" : 21]> g (float[1, 8] x) => (float[1, 8] y) {{ {body} }}'
    return ir.from_proto(onnx.parser.parse_model(text))


def test_an_operator_that_is_refused_is_named_and_one_that_is_built_is_none():
    odd = part("q, s, z = DynamicQuantizeLinear (x)  y = DequantizeLinear (q, s, z)")
    assert "DynamicQuantizeLinear" in find_problem(odd, IMAGES, 60)
    assert find_problem(part("y = Relu (x)"), IMAGES, 60) is None
