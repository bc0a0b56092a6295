from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

from deploykit.calibration.cast_to_half import cast_to_half
from deploykit.calibration.half import plan_half
from tests.calibration.networks import master_graph, plan_of, rounding_noise_db

IMAGES = np.random.default_rng(0).normal(size=(4, 3, 32, 32)).astype(np.float32)


class Uneven(nn.Module):
    """Three convolutions, of which the middle one can have weights that half precision cannot hold."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.three = (nn.Conv2d(channels, 8, 3) for channels in (3, 8, 8))
        self.scale = scale
        with torch.no_grad():
            self.two.weight *= scale
            self.two.bias.zero_()
            self.three.weight /= scale if scale > 1 else 1

    def forward(self, images):
        two = self.two(self.one(images).relu()).relu()
        return (self.three((two / self.scale).relu() if self.scale < 1 else two),)  # a factor that no pass folds


def test_nothing_is_kept_when_the_budget_is_met(residual):
    assert plan_half(residual.graph.model, residual.images, min_sqnr_db=45).float_weights == {}


def test_weights_too_small_for_half_precision_are_found_and_kept():
    graph = master_graph(Uneven(1e-7), ("maps",), IMAGES)
    plan = plan_half(graph.model, IMAGES, min_sqnr_db=45)
    (name,) = plan.float_weights
    assert "two.weight" in name
    assert plan.float_weights[name] < 30
    half = cast_to_half(graph.model, plan)
    kept = {key: value.const_value.dtype for key, value in half.graph.initializers.items() if len(value.shape) == 4}
    assert kept.pop(name) == ir.DataType.FLOAT
    assert set(kept.values()) == {ir.DataType.FLOAT16}


def test_weights_too_large_for_half_precision_are_found_and_kept():
    plan = plan_half(master_graph(Uneven(1e7), ("maps",), IMAGES).model, IMAGES, min_sqnr_db=45)
    assert any("two.weight" in name for name in plan.float_weights)


def test_a_higher_budget_keeps_more_weights(residual):
    kept = [
        len(plan_half(residual.graph.model, residual.images, min_sqnr_db=budget).float_weights)
        for budget in (40, 68, 150)
    ]
    assert kept[0] == 0 < kept[1] <= kept[2] == len(residual.plan.placement.weights)


@pytest.mark.slow
def test_real_weights_meet_the_budget_in_half_precision(lite0):
    plan = plan_half(lite0.graph.model, lite0.images, min_sqnr_db=45)
    found = lite0.run(cast_to_half(lite0.graph.model, plan))
    assert min(rounding_noise_db(lite0.run(), found)) > 45


def test_a_graph_of_matrix_products_is_measured_too():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(32, 12)

        def forward(self, images):
            return (self.linear(images),)

    graph = master_graph(Tokens(), ("tokens",), IMAGES)
    assert plan_of(graph, IMAGES).placement.weights
    assert plan_half(graph.model, IMAGES, min_sqnr_db=150).float_weights
