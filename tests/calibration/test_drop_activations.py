from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from torch import nn

from deploykit.calibration.dialect import OnnxDialect
from deploykit.calibration.drop_activations import drop_activations
from deploykit.calibration.quantize_activations import INT8, UINT8, quantize_activations
from deploykit.calibration.quantize_weights import quantize_weights
from deploykit.calibration.tidy_graph import tidy_graph
from deploykit.onnx_session import onnx_session
from tests.calibration.networks import master_graph, plan_of, written

IMAGES = np.random.default_rng(0).normal(size=(3, 3, 32, 32)).astype(np.float32)
KEPT = (quantize_weights(integer_bias=True), quantize_activations(UINT8, writes=True), tidy_graph)
DROPPED = (*KEPT[:2], drop_activations(), tidy_graph)


class Clipped(nn.Module):
    """A convolution and an activation that clips, read by another convolution."""

    def __init__(self, activation: nn.Module, gain: float) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        nn.init.normal_(self.first.weight, std=gain)
        self.activation = activation

    def forward(self, images):
        return (self.second(self.activation(self.first(images))),)


def kinds_of(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def dropped(graph, plan) -> ir.Model:
    return written(OnnxDialect(int8=DROPPED), graph, plan)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6()], ids=["relu", "relu6"])
def test_an_activation_that_the_range_does_by_itself_is_dropped(activation):
    graph = master_graph(Clipped(activation, 1.0), ("maps",), IMAGES)
    plan = plan_of(graph, IMAGES)
    found = dropped(graph, plan)
    assert not {"Relu", "Clip"} & set(kinds_of(found))
    kept = written(OnnxDialect(int8=KEPT), graph, plan)
    assert {"Relu", "Clip"} & set(kinds_of(kept))
    (one,), (other,) = (onnx_session(model).run(None, {"images": IMAGES[:1]}) for model in (found, kept))
    np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize(
    "activation", [nn.Hardtanh(-1.0, 6.0), nn.Hardtanh(0.5, 6.0)], ids=["negative values pass", "bound above zero"]
)
def test_a_clip_that_the_range_does_not_do_by_itself_stays(activation):
    graph = master_graph(Clipped(activation, 1.0), ("maps",), IMAGES)
    assert kinds_of(dropped(graph, plan_of(graph, IMAGES)))["Clip"] == 1


def test_a_clip_whose_bound_lies_inside_the_range_stays():
    graph = master_graph(Clipped(nn.ReLU6(), 1.0), ("maps",), IMAGES)
    plan = plan_of(graph, IMAGES)
    (clipped,) = (str(node.outputs[0].name) for node in graph.model.graph if node.op_type == "Clip")
    wider = replace(plan, ranges=plan.ranges | {clipped: replace(plan.ranges[clipped], high=6.5)})
    assert kinds_of(dropped(graph, wider))["Clip"] == 1


def test_an_activation_whose_source_is_read_elsewhere_stays():
    class Branching(Clipped):
        def forward(self, images):
            first = self.first(images)
            return (self.second(first.relu()), first)

    graph = master_graph(Branching(nn.ReLU(), 1.0), ("maps", "before"), IMAGES)
    assert kinds_of(dropped(graph, plan_of(graph, IMAGES)))["Relu"] == 1


def test_what_stands_between_integer_kernels_is_dropped_only_with_them():
    class Gated(Clipped):
        def forward(self, images):
            gated = nn.functional.hardswish(self.first(images))
            return (self.second((gated + gated).relu()),)

    graph = master_graph(Gated(nn.Identity(), 1.0), ("maps",), IMAGES)
    plan = plan_of(graph, IMAGES)
    assert plan.placement.between
    kinds = {}
    for between in (False, True):
        passes = (quantize_activations(UINT8, between=True), drop_activations(between=between), tidy_graph)
        kinds[between] = kinds_of(written(OnnxDialect(int8=passes), graph, plan))["Relu"]
    assert kinds == {False: 1, True: 0}


def test_signed_integers_keep_their_activations_where_the_pass_is_left_out(residual):
    passes = (quantize_weights(integer_bias=False), quantize_activations(INT8), tidy_graph)
    found = kinds_of(written(OnnxDialect(int8=passes), residual.graph, residual.plan))
    assert found["Relu"] == kinds_of(residual.graph.model)["Relu"] > 4
