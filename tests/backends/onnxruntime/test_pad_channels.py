from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn

from deploykit.backends.onnxruntime.pad_channels import GROUP_CHANNELS, LANES, pad_channels
from deploykit.backends.onnxruntime.passes import DIALECT
from deploykit.calibration.plan import QuantizationPlan
from deploykit.calibration.rounded_weight import RoundedWeight
from deploykit.onnx_session import onnx_session
from tests.calibration.networks import master_graph, plan_of, rounding_noise_db

IMAGES = np.random.default_rng(0).normal(size=(3, 3, 16, 16)).astype(np.float32)


class Grouped(nn.Module):
    """Groups of 16 channels, as RegNet has them, between two plain convolutions."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        channels = 16 * groups
        self.layers = nn.Sequential(
            nn.Conv2d(3, channels, 3, padding=1),
            nn.Conv2d(channels, channels, 3, groups=groups),
            nn.Conv2d(channels, 8, 1),
        )

    def forward(self, images):
        return (self.layers(images),)


class Inverted(nn.Module):
    """An inverted residual of 24 channels with squeeze-and-excitation, as MobileNetV3 has them."""

    def __init__(self, *, shown: bool = False) -> None:
        super().__init__()
        self.expand, self.depthwise = nn.Conv2d(3, 24, 1), nn.Conv2d(24, 24, 5, padding=2, groups=24)
        self.squeeze = nn.Sequential(nn.Conv2d(24, 8, 1), nn.ReLU(), nn.Conv2d(8, 24, 1), nn.Hardsigmoid())
        self.project = nn.Conv2d(24, 8, 1)
        self.shown = shown

    def forward(self, images):
        maps = nn.functional.hardswish(self.depthwise(self.expand(images).relu()))
        projected = self.project(maps * self.squeeze(maps.mean((2, 3), keepdim=True)))
        return (maps, projected) if self.shown else (projected,)


def prepared(module: nn.Module, *names: str):
    graph = master_graph(module, names, IMAGES)
    return graph, plan_of(graph, IMAGES)


def widen(model: ir.Model, plan: QuantizationPlan) -> tuple[ir.Model, QuantizationPlan]:
    """A copy of a graph, and its plan, after the pass."""
    copy = model.clone()
    return copy, pad_channels(copy, plan)


def weights_of(model: ir.Model) -> dict[str, np.ndarray]:
    return {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}


def convolutions(model: ir.Model) -> list[tuple[int, list[int]]]:
    """Groups and weight's shape of every convolution of a float graph, in order."""
    return [
        (node.attributes.get_int("group", 1), list(node.inputs[1].const_value.numpy().shape))
        for node in model.graph
        if node.op_type == "Conv"
    ]


def outputs(model: ir.Model) -> list[np.ndarray]:
    return onnx_session(model).run(None, {"images": IMAGES[:1]})


@pytest.mark.parametrize(("groups", "joined"), [(8, 2), (4, 1), (6, 1), (3, 1)])
def test_narrow_groups_are_joined_by_zeros(groups, joined):
    graph, plan = prepared(Grouped(groups), "maps")
    model, _ = widen(graph.model, plan)
    found, shape = convolutions(model)[1]
    assert found == joined
    assert shape[1] >= GROUP_CHANNELS or joined == 1
    np.testing.assert_allclose(outputs(model)[0], outputs(graph.model)[0], atol=1e-5)


def test_depthwise_channels_are_padded_from_the_layer_before_to_the_layer_behind():
    graph, plan = prepared(Inverted(), "maps")
    model, wider = widen(graph.model, plan)
    padded = -(-24 // LANES) * LANES
    assert [(group, shape[:2]) for group, shape in convolutions(model)] == [
        (1, [padded, 3]),
        (padded, [padded, 1]),
        (1, [8, padded]),
        (1, [padded, 8]),
        (1, [8, padded]),
    ]
    np.testing.assert_allclose(outputs(model)[0], outputs(graph.model)[0], atol=1e-5)
    by_output = {node.outputs[0].name: node.name for node in graph.model.graph}
    assert {len(wider.bias_shift[name]) for name in by_output.values() if name in wider.bias_shift} == {padded, 8}


def test_channels_that_the_graph_gives_are_not_padded():
    graph, plan = prepared(Inverted(shown=True), "activated", "maps")
    model, same = widen(graph.model, plan)
    assert convolutions(model) == convolutions(graph.model)
    assert same.bias_shift.keys() == plan.bias_shift.keys()


@pytest.mark.parametrize("module", [Grouped(8), Inverted()], ids=["grouped", "inverted"])
def test_the_integer_graph_is_valid_and_near_fp32(module):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        graph, plan = prepared(module, "maps")
    model = DIALECT.render(graph, plan, IMAGES).graph.model
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert rounding_noise_db(outputs(graph.model), outputs(model))[0] > 25


@pytest.mark.parametrize("module", [Grouped(8), Inverted()], ids=["groups", "depthwise"])
def test_weights_that_were_rounded_otherwise_stay_so(module):
    graph, plan = prepared(module, "maps")
    weights = weights_of(graph.model)
    chosen = {}
    for node, use in plan.placement.weights.items():
        integers, scales = plan.integers_of(node, weights[use.weight], use.axis)
        chosen[node] = RoundedWeight.of(weights[use.weight], use.axis, np.clip(integers + 1, -127, 127), scales)
    rounded = replace(plan, weights=chosen)
    model, wider = widen(graph.model, rounded)
    padded = weights_of(model)
    for node, use in plan.placement.weights.items():
        before, steps = rounded.integers_of(node, weights[use.weight], use.axis)
        after, wider_steps = wider.integers_of(node, padded[use.weight], use.axis)
        np.testing.assert_array_equal(after[padded[use.weight] != 0], before[weights[use.weight] != 0])
        assert not after[padded[use.weight] == 0].any()
        np.testing.assert_array_equal(wider_steps[: len(steps)], steps)
