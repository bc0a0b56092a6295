from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest
from torch import nn

from deploykit.backends.onnxruntime import passes as onnxruntime
from deploykit.backends.openvino import passes as openvino
from deploykit.backends.tensorrt import passes as tensorrt
from deploykit.calibration.dialect import keep_float
from deploykit.calibration.float_fallback import keep_image_side, keep_pointlike
from tests.calibration.networks import master_graph, plan_of, written

IMAGES = np.random.default_rng(0).normal(size=(3, 3, 32, 32)).astype(np.float32)


class Mobile(nn.Module):
    """What MobileNet has at the image: a stem, a depthwise convolution, a projection, and an expansion."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU6())
        self.depthwise = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.ReLU6())
        self.project, self.expand = nn.Conv2d(32, 16, 1), nn.Conv2d(16, 64, 1)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(64, 40, 1))

    def forward(self, images):
        return (self.head(self.expand(self.project(self.depthwise(self.stem(images)))).relu()),)


@pytest.fixture(scope="module")
def mobile():
    graph = master_graph(Mobile(), ("head",), IMAGES)
    return graph, plan_of(graph, IMAGES)


def weights_of(plan) -> list[str]:
    return [use.weight for use in plan.placement.weights.values()]


def test_the_image_side_ends_where_a_convolution_widens(mobile):
    graph, plan = mobile
    left = keep_float(graph.model, plan, (keep_image_side, keep_pointlike(fewest_weights=0)))
    gone = [name for name in weights_of(plan) if name not in weights_of(left)]
    assert [name.split(".")[0] for name in gone] == ["stem", "depthwise", "project"]
    assert all("large a map" in reason for reason in left.placement.float_nodes.values())
    assert len(left.placement.float_nodes) == 3


@pytest.mark.parametrize(("fewest", "kept"), [(0, True), (64 * 40, True), (64 * 40 + 1, False), (None, False)])
def test_convolutions_on_1x1_maps_need_enough_weights(mobile, fewest, kept):
    graph, plan = mobile
    left = keep_float(graph.model, plan, (keep_pointlike(fewest_weights=fewest),))
    assert ("head.1.weight" in weights_of(left)) == kept
    assert bool(left.placement.float_nodes) != kept


def test_what_a_runtime_keeps_in_float_is_told_once_and_the_plan_stays(mobile):
    graph, plan = mobile
    dialect = onnxruntime.DIALECT
    kept = dialect.keep_float(graph.model, plan)
    assert kept.placement.float_nodes
    assert not plan.placement.float_nodes
    assert dialect.keep_float(graph.model, kept) is kept
    one, other = (ir.to_proto(written(dialect, graph, each)).SerializeToString() for each in (plan, kept))
    assert one == other


@pytest.mark.parametrize("dialect", [openvino.DIALECT, tensorrt.DIALECT], ids=["openvino", "tensorrt"])
def test_the_stem_stays_in_integers_elsewhere_and_a_small_head_in_float(mobile, dialect):
    graph, plan = mobile
    kept = dialect.keep_float(graph.model, plan)
    assert weights_of(kept) == weights_of(plan)[:-1]
    kinds = Counter(node.op_type for node in written(dialect, graph, plan).graph)
    assert kinds["QuantizeLinear"] >= 4
