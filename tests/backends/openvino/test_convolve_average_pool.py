"""Padded average pools of a map that other layers read in integers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from deploykit.backends.openvino.debug import find_problem, run_part
from deploykit.backends.openvino.passes import DIALECT
from deploykit.onnx_session import onnx_session
from deploykit.parity.metrics import sqnr_db
from tests.calibration.networks import master_graph, plan_of, written

pytest.importorskip("openvino", reason="openvino is not installed")

IMAGES = np.random.default_rng(0).standard_normal((24, 3, 32, 32)).astype(np.float32)
KEPT_DB = 30.0


class Branches(nn.Module):
    """A pooling branch beside a convolution, as in an Inception block."""

    def __init__(self, pool: nn.Module, act: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.other, self.pool = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 1), pool
        self.act = act or nn.Identity()

    def forward(self, images):
        maps = self.act(self.stem(images))
        return self.pool(maps), self.other(maps)


class Joined(Branches):
    """The pooling reads two maps, each with integers of its own."""

    def forward(self, images):
        maps = self.stem(images)
        other = self.other(maps)
        return self.pool(torch.cat([maps, other], 1)), self.other(other) + maps


def operators(model) -> list[str]:
    return [node.op_type for node in model.graph]


def kept_db(graph, model) -> float:
    """What a rendered graph in OpenVINO keeps of the pooling, in dB."""
    inputs = {"images": IMAGES[:1]}
    (exact, _), (found, _) = onnx_session(graph.model).run(None, inputs), run_part(model, inputs)
    return sqnr_db(exact, found)


POOLS = {
    "around": nn.AvgPool2d(3, 1, 1),
    "strided": nn.AvgPool2d((3, 5), (2, 3), (1, 2)),
    "pad before": nn.Sequential(nn.ZeroPad2d(1), nn.AvgPool2d(3, 2)),
    "over the end": nn.AvgPool2d(3, 2, 1, ceil_mode=True),
}


@pytest.mark.parametrize("network", [Branches, Joined])
@pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS)
def test_the_padding_of_integers_is_zero(pool, network):
    graph = master_graph(network(pool), ("pooled", "other"), IMAGES)
    model = written(DIALECT, graph, plan_of(graph, IMAGES))
    assert "AveragePool" not in operators(model)
    assert kept_db(graph, model) > KEPT_DB


def test_the_runtime_pads_otherwise_by_itself(monkeypatch):
    graph = master_graph(Branches(POOLS["around"]), ("pooled", "other"), IMAGES)
    monkeypatch.setattr("deploykit.backends.openvino.convolve_average_pool._has_zero_point", lambda value: False)
    model = written(DIALECT, graph, plan_of(graph, IMAGES))
    problem = find_problem(model, {"images": IMAGES[:1]}, KEPT_DB)
    assert problem is not None, "this OpenVINO pads rightly: the pass can go"
    assert "pooled" in problem


@pytest.mark.parametrize(
    "pool",
    [nn.AvgPool2d(2), nn.AvgPool2d(3, 1, 1, count_include_pad=False)],
    ids=["not padded", "padding does not count"],
)
def test_other_poolings_are_left_alone(pool):
    graph = master_graph(Branches(pool), ("pooled", "other"), IMAGES)
    model = written(DIALECT, graph, plan_of(graph, IMAGES))
    assert "AveragePool" in operators(model)
    assert kept_db(graph, model) > KEPT_DB


def test_integers_whose_zero_is_zero_stay_in_their_pooling():
    graph = master_graph(Branches(POOLS["around"], nn.ReLU()), ("pooled", "other"), IMAGES)
    model = written(DIALECT, graph, plan_of(graph, IMAGES))
    assert "AveragePool" in operators(model)
    assert kept_db(graph, model) > KEPT_DB
