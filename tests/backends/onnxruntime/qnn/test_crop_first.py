"""A map that is cropped and rolled is cropped first: the same numbers, and QNN's compiler takes it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deploykit.backends.onnxruntime.qnn.crop_first import crop_first
from deploykit.backends.onnxruntime.qnn.lower import lower
from deploykit.backends.onnxruntime.qnn.passes import DIALECT
from deploykit.calibration.half import HalfPlan
from tests.backends.onnxruntime.qnn.conftest import OPTIONS
from tests.calibration.networks import master_graph
from tests.fusion.graphs import DYNAMIC, SPEC, Calls
from tests.fusion.onnx_graphs import counts, graph_of, is_left_alone, rewritten


def rolled_back(_, x: torch.Tensor) -> torch.Tensor:
    """The first ten rows and columns of a map, rolled by three."""
    rows = torch.cat((x[:, :, 7:10], x[:, :, :7]), 2)
    return torch.cat((rows[..., 7:10], rows[..., :7]), 3)


@pytest.mark.parametrize("spec", [SPEC, DYNAMIC], ids=["one image", "a dynamic batch"])
def test_each_join_reads_what_was_cropped_for_it(spec):
    written, after = rewritten(crop_first, graph_of(rolled_back, spec))
    assert written == 2
    assert counts(after) == {"Slice": 6, "Concat": 2}
    for join in (node for node in after.graph if node.op_type == "Concat"):
        (cropped,) = {part.producer().inputs[0] for part in join.inputs}
        assert cropped.producer().op_type == "Slice"


def test_it_happens_once():
    _, after = rewritten(crop_first, graph_of(rolled_back, SPEC))
    assert is_left_alone(crop_first, after)


@pytest.mark.parametrize(
    "network",
    [
        lambda _, x: torch.cat((x[:, :, 7:], x[:, :, :7]), 2),
        lambda _, x: torch.cat((x[:, :, 7:10], x.relu()[:, :, :7]), 2),
        lambda _, x: torch.cat((x[:, :, 7:10], x[:, :, :7].relu()), 2),
        lambda _, x: torch.cat((x[:, :, 0:8:2], x[:, :, :7]), 2),
        lambda _, x: torch.cat((x[:, :, 2:8], x[:, :, 3:9]), 1),
    ],
    ids=["the whole", "two maps", "computed between", "steps", "another axis"],
)
def test_other_joins_are_left_alone(network):
    assert is_left_alone(crop_first, graph_of(network, SPEC))


def test_slices_whose_places_are_computed_are_left_alone():
    model = graph_of(lambda _, x: torch.cat((x[:, :, 7:10], x[:, :, :7]), 2), SPEC)
    assert crop_first(model.clone()) == 1
    next(node for node in model.graph if node.op_type == "Slice").inputs[2].const_value = None
    assert crop_first(model) == 0


def test_qnn_compiles_a_map_that_is_cropped_and_rolled(tmp_path):
    pytest.importorskip("onnxruntime_qnn", reason="onnxruntime-qnn is not installed")

    def network(m, x):
        maps = m.linear(x.permute(0, 2, 3, 1))
        rows = torch.cat((maps[:, 7:10], maps[:, :7]), 1)
        return m.linear(torch.cat((rows[:, :, 7:10], rows[:, :, :7]), 2))

    images = np.zeros((1, 32, 14, 14), np.float32)
    graph = master_graph(Calls(network, linear=torch.nn.Linear(32, 32)), ("stage1",), images)
    lower(DIALECT.render(graph, HalfPlan(float_weights={}), images).graph, tmp_path, OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
