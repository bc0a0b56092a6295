from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from deploykit.calibration.dialects.onnxruntime import STYLE, render
from deploykit.calibration.dialects.qdq import insert_qdq
from deploykit.calibration.plan import onnx_session
from deploykit.calibration.ranges import ActivationRange
from deploykit.spec import Int8
from tests.calibration.networks import master_graph, plan_of, rounding_noise_db

IMAGES = np.random.default_rng(0).normal(size=(4, 3, 32, 32)).astype(np.float32)


class Gated(nn.Module):
    """A convolution, an activation, squeeze-and-excitation, and a convolution that reads the product."""

    def __init__(self, activation: nn.Module, gate: nn.Module) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 8, 3, padding=1)
        self.squeeze = nn.Sequential(nn.Conv2d(16, 4, 1), nn.ReLU(), nn.Conv2d(4, 16, 1), gate)
        self.activation = activation

    def forward(self, images):
        maps = self.activation(self.first(images))
        return (self.second(maps * self.squeeze(maps.mean((2, 3), keepdim=True))),)


def in_onnxruntime(model: onnx.ModelProto, path) -> Counter[str]:
    """The kinds of nodes that ONNX Runtime keeps."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(path)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(path).graph.node)


@pytest.mark.parametrize(
    ("activation", "gate", "adds", "products"),
    [(nn.Hardswish(), nn.Hardsigmoid(), 1, 2), (nn.SiLU(), nn.Sigmoid(), 0, 2), (nn.ReLU(), nn.Sigmoid(), 0, 1)],
    ids=["hard-swish", "silu", "relu"],
)
def test_gated_maps_stay_in_integers(activation, gate, adds, products, tmp_path):
    graph = master_graph(Gated(activation, gate), ("maps",), IMAGES)
    plan = plan_of(graph, IMAGES)
    style = replace(STYLE, float_image_side=False)
    model = insert_qdq(graph.model, plan, style)
    onnx.checker.check_model(model, full_check=True)
    kinds = in_onnxruntime(model, tmp_path / "optimized.onnx")
    assert kinds["QLinearMul"] == products
    assert kinds["QLinearAdd"] == adds
    assert kinds["QLinearGlobalAveragePool"] == 1
    assert kinds["QLinearConv"] == 4
    assert not {"HardSwish", "HardSigmoid", "Mul", "ReduceMean", "Relu"} & set(kinds)
    images = {"images": IMAGES[:1]}
    found, expected = (onnx_session(each).run(None, images) for each in (model, graph.model))
    in_float = onnx_session(insert_qdq(graph.model, plan, replace(style, integer_gates=False))).run(None, images)
    assert rounding_noise_db(expected, found)[0] > rounding_noise_db(expected, in_float)[0] - 3 > 20


def test_hard_swish_by_rounding_is_hard_swish():
    class Activated(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 8, 1)
            nn.init.normal_(self.first.weight, std=1.0)  # well beyond both ends of the clip

        def forward(self, images):
            maps = nn.functional.hardswish(self.first(images))
            return maps, self.second(maps)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        graph = master_graph(Activated(), ("activated", "maps"), IMAGES)
    plan = plan_of(graph, IMAGES, Int8(calibrator="minmax"))
    found, expected = (
        onnx_session(model).run(["activated"], {"images": IMAGES[:1]})[0]
        for model in (insert_qdq(graph.model, plan, replace(STYLE, float_image_side=False)), graph.model)
    )
    np.testing.assert_allclose(found, expected, atol=0.02 * expected.max())


def test_a_product_of_two_maps_and_a_mean_over_rows_stay_in_float(tmp_path):
    class Near(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.last = (nn.Conv2d(3 if i < 2 else 8, 8, 3, padding=1) for i in range(3))

        def forward(self, images):
            product = self.one(images) * self.two(images)
            return (self.last(product * product.mean(2, keepdim=True)),)

    graph = master_graph(Near(), ("maps",), IMAGES)
    plan = plan_of(graph, IMAGES)
    assert not plan.placement.between
    assert in_onnxruntime(render(graph, plan).model, tmp_path / "optimized.onnx")["Mul"] == 2


def test_a_sigmoids_input_keeps_the_steps_that_it_tells_apart():
    graph = master_graph(Gated(nn.ReLU(), nn.Sigmoid()), ("maps",), IMAGES)
    plan = plan_of(graph, IMAGES)
    source = next(node.input[0] for node in graph.model.graph.node if node.op_type == "Sigmoid")
    wide = replace(plan, ranges=plan.ranges | {source: ActivationRange(low=-30.0, high=20.0, amax=30.0)})
    model = insert_qdq(graph.model, wide, replace(STYLE, float_image_side=False))
    scale = next(t for t in model.graph.initializer if t.name == f"{source}/scale")
    assert onnx.numpy_helper.to_array(scale) == pytest.approx(12 / 255)
    images = {"images": IMAGES[:1]}
    found, expected = (onnx_session(each).run(None, images) for each in (model, graph.model))
    assert rounding_noise_db(expected, found)[0] > 30


def test_a_hard_sigmoid_behind_a_convolution_costs_no_node():
    graph = master_graph(Gated(nn.ReLU(), nn.Hardsigmoid()), ("maps",), IMAGES)
    model = insert_qdq(graph.model, plan_of(graph, IMAGES), replace(STYLE, float_image_side=False))
    kinds = Counter(node.op_type for node in model.graph.node)
    assert not {"HardSigmoid", "Add", "Clip"} & set(kinds)
    found, expected = (onnx_session(each).run(None, {"images": IMAGES[:1]}) for each in (model, graph.model))
    assert rounding_noise_db(expected, found)[0] > 25
