from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch

from deploykit.calibration.patches import LayerShape
from deploykit.errors import CalibrationError

GENERATOR = np.random.default_rng(0)


def node_of(operator: str, **attributes) -> ir.Node:
    return ir.node(operator, [ir.Value(name="x"), ir.Value(name="w")], attributes, name="layer")


def conv_node(**attributes) -> ir.Node:
    return node_of("Conv", **attributes)


@pytest.mark.parametrize(
    ("shape", "attributes"),
    [
        ((6, 4, 3, 3), {"pads": [1, 1, 1, 1]}),
        ((6, 4, 3, 5), {"pads": [0, 2, 1, 1], "strides": [2, 1]}),
        ((8, 1, 3, 3), {"pads": [1, 1, 1, 1], "group": 4}),
        ((6, 2, 2, 2), {"group": 2, "dilations": [2, 3]}),
        ((6, 4, 1, 1), {}),
    ],
    ids=["plain", "uneven", "depthwise", "groups-dilated", "1x1"],
)
def test_rows_times_the_matrix_are_what_the_convolution_gives(shape, attributes):
    weight = GENERATOR.normal(size=shape).astype(np.float32)
    read = GENERATOR.normal(size=(2, 4, 9, 11)).astype(np.float32)
    layer = LayerShape.of(conv_node(**attributes), shape, 0)
    rows = torch.from_numpy(layer.rows(read, 10**6, seed=0)).transpose(0, 1)
    found = (rows @ layer.matrix(weight).transpose(1, 2)).permute(1, 0, 2).reshape(rows.shape[1], -1)
    top, left, bottom, right = attributes.get("pads", [0] * 4)
    padded = np.pad(read, ((0, 0), (0, 0), (top, bottom), (left, right)))
    expected = torch.nn.functional.conv2d(
        torch.from_numpy(padded),
        torch.from_numpy(weight),
        stride=tuple(attributes.get("strides", (1, 1))),
        dilation=tuple(attributes.get("dilations", (1, 1))),
        groups=attributes.get("group", 1),
    )
    torch.testing.assert_close(found, expected.permute(0, 2, 3, 1).reshape(-1, shape[0]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("axis", [0, 1])
def test_rows_of_tokens_times_the_matrix_are_the_product(axis):
    weight = GENERATOR.normal(size=(5, 7)).astype(np.float32)
    matrix = weight.T if axis == 0 else weight  # (K, channels)
    read = GENERATOR.normal(size=(2, 3, matrix.shape[0])).astype(np.float32)
    layer = LayerShape.of(node_of("MatMul"), weight.shape, axis)
    rows = torch.from_numpy(layer.rows(read, 10**6, seed=0))[:, 0]
    expected = (read @ matrix).reshape(-1, matrix.shape[1])
    np.testing.assert_allclose(rows @ layer.matrix(weight)[0].T, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(layer.restore(layer.matrix(weight)), weight)


def test_a_convolutions_weight_is_restored():
    weight = GENERATOR.normal(size=(8, 2, 3, 3)).astype(np.float32)
    layer = LayerShape.of(conv_node(group=4), weight.shape, 0)
    assert layer.matrix(weight).shape == (4, 2, 18)
    np.testing.assert_array_equal(layer.restore(layer.matrix(weight)), weight)


def test_a_sample_is_the_same_for_a_seed_and_has_no_row_twice():
    layer = LayerShape.of(conv_node(), (4, 1, 1, 1), 0)
    read = np.arange(100, dtype=np.float32).reshape(1, 1, 10, 10)
    one, same, other = (layer.rows(read, 30, seed).reshape(-1) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert len(np.unique(one)) == 30
    assert set(one) != set(other)


@pytest.mark.parametrize(("shape", "attributes"), [((4, 3, 3), {}), ((4, 3, 3, 3), {"auto_pad": "SAME_UPPER"})])
def test_convolutions_that_have_no_rows_here_are_refused(shape, attributes):
    with pytest.raises(CalibrationError, match=r"layer is a convolution .*Keep rounding"):
        LayerShape.of(conv_node(**attributes), shape, 0)
