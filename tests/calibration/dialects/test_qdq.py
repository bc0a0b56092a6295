from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from torch import nn

from deploykit.calibration.dialects import onnxruntime
from deploykit.calibration.dialects.qdq import insert_qdq
from deploykit.calibration.plan import onnx_session
from tests.calibration.networks import master_graph, plan_of, rounding_noise_db

IMAGES = np.random.default_rng(0).normal(size=(3, 3, 32, 32)).astype(np.float32)
STYLE = replace(onnxruntime.STYLE, float_image_side=False)  # the networks here begin with what is looked at
STYLES = [
    replace(STYLE, integer_bias=integer_bias, all_writes=all_writes)
    for integer_bias in (False, True)
    for all_writes in (False, True)
]


class Clipped(nn.Module):
    """A convolution and an activation that clips, read by another convolution."""

    def __init__(self, activation: nn.Module, gain: float) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        nn.init.normal_(self.first.weight, std=gain)
        self.activation = activation

    def forward(self, images):
        return (self.second(self.activation(self.first(images))),)


def kinds_of(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


@pytest.mark.parametrize("style", STYLES, ids=str)
def test_every_style_gives_a_valid_graph_near_fp32(residual, style):
    model = insert_qdq(residual.graph.model, residual.plan, style)
    onnx.checker.check_model(model, full_check=True)
    assert [output.name for output in model.graph.output] == ["stage1", "stage2", "logits"]
    assert min(rounding_noise_db(residual.run(), residual.run(model))) > 15
    biases = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT32]
    assert bool(biases) == style.integer_bias


def test_the_master_stays_as_it_is(residual):
    before = residual.graph.model.SerializeToString(deterministic=True)
    insert_qdq(residual.graph.model, residual.plan, STYLE)
    assert residual.graph.model.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6()], ids=["relu", "relu6"])
def test_an_activation_that_the_range_does_by_itself_is_dropped(activation):
    graph = master_graph(Clipped(activation, 1.0), ("maps",), IMAGES)
    plan = plan_of(graph, IMAGES)
    found = insert_qdq(graph.model, plan, STYLE)
    assert not {"Relu", "Clip"} & set(kinds_of(found))
    kept = insert_qdq(graph.model, plan, replace(STYLE, drop_activations=False))
    assert {"Relu", "Clip"} & set(kinds_of(kept))
    (one,), (other,) = (onnx_session(model).run(None, {"images": IMAGES[:1]}) for model in (found, kept))
    np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize(
    "activation", [nn.Hardtanh(-1.0, 6.0), nn.Hardtanh(0.5, 6.0)], ids=["negative values pass", "bound above zero"]
)
def test_a_clip_that_the_range_does_not_do_by_itself_stays(activation):
    graph = master_graph(Clipped(activation, 1.0), ("maps",), IMAGES)
    assert kinds_of(insert_qdq(graph.model, plan_of(graph, IMAGES), STYLE))["Clip"] == 1


def test_a_clip_whose_bound_lies_inside_the_range_stays():
    graph = master_graph(Clipped(nn.ReLU6(), 1.0), ("maps",), IMAGES)
    plan = plan_of(graph, IMAGES)
    (clipped,) = (node.output[0] for node in graph.model.graph.node if node.op_type == "Clip")
    wider = replace(plan, ranges=plan.ranges | {clipped: replace(plan.ranges[clipped], high=6.5)})
    assert kinds_of(insert_qdq(graph.model, wider, STYLE))["Clip"] == 1


def test_an_activation_whose_source_is_read_elsewhere_stays():
    class Branching(Clipped):
        def forward(self, images):
            first = self.first(images)
            return (self.second(first.relu()), first)

    graph = master_graph(Branching(nn.ReLU(), 1.0), ("maps", "before"), IMAGES)
    assert kinds_of(insert_qdq(graph.model, plan_of(graph, IMAGES), STYLE))["Relu"] == 1


def test_a_shared_weight_is_quantized_for_each_of_its_nodes():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.shared = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, images):
            return (self.shared(self.shared(self.stem(images).relu()).relu()),)

    graph = master_graph(Twice(), ("maps",), IMAGES)
    model = insert_qdq(graph.model, plan_of(graph, IMAGES), STYLE)
    onnx.checker.check_model(model)
    large = Counter(t.data_type for t in model.graph.initializer if len(t.dims) == 4)
    assert large == {onnx.TensorProto.INT8: 3}


def test_a_channel_of_zeros_gives_finite_numbers():
    module = Clipped(nn.ReLU(), 1.0)
    nn.init.zeros_(module.first.weight[2:4])
    nn.init.zeros_(module.second.weight)
    graph = master_graph(module, ("maps",), IMAGES)
    (found,) = onnx_session(insert_qdq(graph.model, plan_of(graph, IMAGES), STYLE)).run(None, {"images": IMAGES[:1]})
    (expected,) = onnx_session(graph.model).run(None, {"images": IMAGES[:1]})
    np.testing.assert_allclose(found, expected, atol=2e-3)


def test_a_convolution_without_bias_gets_the_correction(residual):
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.only = nn.Conv2d(3, 8, 3, bias=False)

        def forward(self, images):
            return (self.only(images),)

    graph = master_graph(Bare(), ("maps",), IMAGES + 1)
    plan = plan_of(graph, IMAGES + 1)
    model = insert_qdq(graph.model, plan, replace(STYLE, integer_bias=False))
    (convolution,) = (node for node in model.graph.node if node.op_type == "Conv")
    (bias,) = (t for t in model.graph.initializer if t.name == convolution.input[2])
    (shift,) = plan.bias_shift.values()
    np.testing.assert_allclose(numpy_helper.to_array(bias), shift)
    assert np.abs(shift).max() > 0
