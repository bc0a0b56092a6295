"""The mean output of a layer from the mean of what it reads, beside the layer itself."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from deploykit.calibration.instrumented import Instrumented
from deploykit.calibration.mean_patches import PatchWindow, mean_output, mean_row
from deploykit.calibration.placement import place
from deploykit.spec import Int8

CONVOLUTIONS = {
    "pointwise": ((5, 4, 1, 1), (9, 8), {}),
    "padded": ((5, 4, 3, 3), (9, 8), {"pads": [1, 1, 1, 1]}),
    "strided": ((5, 4, 3, 3), (9, 8), {"pads": [1, 1, 1, 1], "strides": [2, 2]}),
    "strided pointwise": ((5, 4, 1, 1), (9, 8), {"strides": [2, 3]}),
    "patches": ((5, 4, 4, 4), (8, 8), {"strides": [4, 4]}),
    "unequal sides": ((5, 4, 3, 5), (9, 8), {"pads": [0, 2, 1, 3], "strides": [3, 2]}),
    "dilated": ((5, 4, 3, 3), (9, 8), {"pads": [2, 2, 2, 2], "dilations": [2, 2]}),
    "kernel wider than its map": ((5, 4, 7, 7), (2, 2), {"pads": [3, 3, 3, 3]}),
    "depthwise": ((4, 1, 3, 3), (9, 8), {"pads": [1, 1, 1, 1], "group": 4}),
    "grouped": ((6, 2, 3, 3), (9, 8), {"pads": [1, 1, 1, 1], "group": 2, "strides": [2, 2]}),
    "same upper": ((5, 4, 3, 3), (9, 8), {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    "same lower": ((5, 4, 2, 2), (9, 8), {"auto_pad": "SAME_LOWER"}),
    "valid": ((5, 4, 3, 3), (9, 8), {"auto_pad": "VALID"}),
    "one axis": ((5, 4, 3), (9,), {"pads": [1, 1], "strides": [2]}),
    "three axes": ((5, 4, 2, 3, 1), (5, 6, 4), {"pads": [0, 1, 0, 1, 1, 0], "strides": [1, 2, 1]}),
}
PRODUCTS = {
    "MatMul": ((4, 5), 1, {}),
    "Gemm": ((4, 5), 1, {"alpha": 0.5}),
    "transposed Gemm": ((5, 4), 0, {"transB": 1}),
}


def model_of(operator, attributes, read, weight):
    node = helper.make_node(operator, ["read", "weight"], ["written"], name="layer", **attributes)
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, array.shape)
        for name, array in (("read", read), ("weight", weight))
    ]
    written = helper.make_tensor_value_info("written", TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "layer", values, [written])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def run(model, read, weight):
    (written,) = ReferenceEvaluator(model).run(None, {"read": read, "weight": weight})
    return written


def node_of(model):
    (node,) = ir.from_proto(model).graph
    return node


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_a_convolutions_mean_output_follows_from_its_mean_patch(kind, images):
    shape, map_size, attributes = CONVOLUTIONS[kind]
    generator = np.random.default_rng(0)
    weight = generator.normal(size=shape).astype(np.float32)
    channels = shape[1] * attributes.get("group", 1)
    read = generator.normal(1.0, size=(images, channels, *map_size)).astype(np.float32)
    model = model_of("Conv", attributes, read, weight)
    written = run(model, read, weight)
    patch = PatchWindow.of(node_of(model), shape).mean(read)
    assert patch.shape == (channels, *shape[2:])
    expected = written.mean(axis=(0, *range(2, written.ndim)))
    np.testing.assert_allclose(mean_output(node_of(model), weight, 0, patch), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", PRODUCTS)
def test_a_products_mean_output_follows_from_its_mean_row(kind):
    shape, axis, attributes = PRODUCTS[kind]
    operator = kind.split()[-1]
    generator = np.random.default_rng(0)
    weight = generator.normal(size=shape).astype(np.float32)
    read = generator.normal(1.0, size=(6, 4) if operator == "Gemm" else (2, 3, 4)).astype(np.float32)
    model = model_of(operator, attributes, read, weight)
    expected = run(model, read, weight).reshape(-1, 5).mean(axis=0)
    found = mean_output(node_of(model), weight, axis, mean_row(read))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_layers_that_read_one_tensor_in_one_way_share_a_probe():
    read = np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32)
    weights = [numpy_helper.from_array(np.ones((4, side), np.float32), f"weight{side}") for side in (5, 6)]
    nodes = [
        helper.make_node("MatMul", ["read", f"weight{side}"], [f"written{side}"], name=f"layer{side}")
        for side in (5, 6)
    ]
    values = [helper.make_tensor_value_info("read", TensorProto.FLOAT, [2, 4])]
    written = [helper.make_tensor_value_info(f"written{side}", TensorProto.FLOAT, [2, side]) for side in (5, 6)]
    graph = helper.make_graph(nodes, "layers", values, written, weights)
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9))
    _, probes = Instrumented(model, Int8(bias_correction="fast").filled()).observe(read)
    np.testing.assert_allclose(probes["layer5/mean_patch"], read.mean(axis=0), rtol=1e-6)
    assert len(probes) == 1
    assert Instrumented(model, Int8(bias_correction=None).filled()).observe(read)[1] == {}


def test_a_product_that_reads_its_input_transposed_stays_in_float():
    weight = np.ones((4, 5), np.float32)
    model = ir.from_proto(model_of("Gemm", {"transA": 1}, np.ones((4, 6), np.float32), weight))
    graph = model.graph
    graph.inputs[1].const_value = ir.tensor(weight, name="weight")
    graph.register_initializer(graph.inputs.pop(1))
    assert "transposed" in place(model).float_nodes["layer"]
