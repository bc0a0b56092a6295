from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

from deploykit.backends.onnxruntime.pad_channels import pad_channels
from deploykit.backends.onnxruntime.passes import DIALECT
from deploykit.calibration.drop_activations import drop_activations
from deploykit.calibration.plan import QuantizationPlan
from deploykit.calibration.quantize_activations import UINT8, quantize_activations
from deploykit.calibration.quantize_weights import quantize_weights
from deploykit.calibration.ranges import ActivationRange
from deploykit.calibration.tidy_graph import tidy_graph
from deploykit.graph import OnnxGraph
from deploykit.onnx_session import onnx_session
from deploykit.spec import Int8
from tests.calibration.networks import master_graph, plan_of, rounding_noise_db

IMAGES = np.random.default_rng(0).normal(size=(4, 3, 32, 32)).astype(np.float32)
WHOLE = replace(DIALECT, float_choices=())
"""The dialect without what it keeps in float at the image's side, which is most of so small a network."""
GATES_IN_FLOAT = replace(
    WHOLE,
    int8=(
        pad_channels,
        quantize_weights(integer_bias=True),
        quantize_activations(UINT8, writes=True),
        drop_activations(),
        tidy_graph,
    ),
)
"""The same without `fold_hard_sigmoids`, `split_gates` and `clip_gate_ranges`, and gated maps as they are."""


def rendered(graph: OnnxGraph, plan: QuantizationPlan, dialect=WHOLE) -> ir.Model:
    return dialect.render(graph, plan, IMAGES).graph.model


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


def in_onnxruntime(model: ir.Model, path) -> Counter[str]:
    """The kinds of nodes that ONNX Runtime keeps."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(path)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(path).graph.node)


@pytest.mark.parametrize(
    ("activation", "gate", "adds", "products"),
    [(nn.Hardswish(), nn.Hardsigmoid(), 1, 2), (nn.SiLU(), nn.Sigmoid(), 0, 2), (nn.ReLU(), nn.Sigmoid(), 0, 1)],
    ids=["hard-swish", "silu", "relu"],
)
def test_gated_maps_stay_in_integers(activation, gate, adds, products, tmp_path):
    graph = master_graph(Gated(activation, gate), ("maps",), IMAGES)
    plan = plan_of(graph, IMAGES)
    model = rendered(graph, plan)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    kinds = in_onnxruntime(model, tmp_path / "optimized.onnx")
    assert kinds["QLinearMul"] == products
    assert kinds["QLinearAdd"] == adds
    assert kinds["QLinearGlobalAveragePool"] == 1
    assert kinds["QLinearConv"] == 4
    assert not {"HardSwish", "HardSigmoid", "Mul", "ReduceMean", "Relu"} & set(kinds)
    images = {"images": IMAGES[:1]}
    found, expected = (onnx_session(each).run(None, images) for each in (model, graph.model))
    in_float = onnx_session(rendered(graph, plan, GATES_IN_FLOAT)).run(None, images)
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
        for model in (rendered(graph, plan), graph.model)
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
    assert in_onnxruntime(rendered(graph, plan, DIALECT), tmp_path / "optimized.onnx")["Mul"] == 2


def test_a_sigmoids_input_keeps_the_steps_that_it_tells_apart():
    graph = master_graph(Gated(nn.ReLU(), nn.Sigmoid()), ("maps",), IMAGES)
    plan = plan_of(graph, IMAGES)
    source = next(node.inputs[0].name for node in graph.model.graph if node.op_type == "Sigmoid")
    wide = replace(plan, ranges=plan.ranges | {source: ActivationRange(low=-30.0, high=20.0, amax=30.0)})
    model = rendered(graph, wide)
    assert model.graph.initializers[f"{source}/scale"].const_value.numpy() == pytest.approx(12 / 255)
    images = {"images": IMAGES[:1]}
    found, expected = (onnx_session(each).run(None, images) for each in (model, graph.model))
    assert rounding_noise_db(expected, found)[0] > 30


def test_a_hard_sigmoid_behind_a_convolution_costs_no_node():
    graph = master_graph(Gated(nn.ReLU(), nn.Hardsigmoid()), ("maps",), IMAGES)
    model = rendered(graph, plan_of(graph, IMAGES))
    kinds = Counter(node.op_type for node in model.graph)
    assert not {"HardSigmoid", "Add", "Clip"} & set(kinds)
    found, expected = (onnx_session(each).run(None, {"images": IMAGES[:1]}) for each in (model, graph.model))
    assert rounding_noise_db(expected, found)[0] > 25
