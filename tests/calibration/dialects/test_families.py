"""What the runtimes make of each family's INT8 graph: the whole plan in integers, but for what a dialect leaves out."""

from __future__ import annotations

import onnx
import pytest
import torch

import deploykit
from deploykit.calibration.dialects import onnxruntime, openvino
from deploykit.calibration.images import calibration_set
from deploykit.export.speed import left_in_onnxruntime, left_in_openvino
from deploykit.export.to_openvino import to_openvino
from deploykit.export.trace import Everything, output_names
from tests.backbones.realistic import randomize
from tests.calibration.networks import master_graph, plan_of

FAMILIES = {
    "resnet18": 64,
    "mobilenetv2_050": 64,
    "mobilenetv3_small_100": 64,
    "regnety_002": 64,
    "vit_tiny_patch16_224": 64,
    "convnext_tiny": 64,
    "swin_tiny_patch4_window7_224": 224,
}
SLOW = ("convnext_tiny", "swin_tiny_patch4_window7_224")


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in FAMILIES],
)
def family(request, photographs):
    """A master graph and its plan."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = randomize(deploykit.create_backbone(request.param, image_size=FAMILIES[request.param])).eval()
    images = calibration_set(photographs, backbone.input_spec).sample(2)
    graph = master_graph(Everything(backbone), output_names(backbone), images)
    return graph, plan_of(graph, images)


def floats(left: dict[str, int]) -> int:
    return sum(count for operator, count in left.items() if operator.startswith("float "))


def test_onnxruntime_runs_the_plan_in_integers(family, tmp_path):
    graph, plan = family
    onnx.save(onnxruntime.render(graph, plan).model, tmp_path / "model.onnx")
    placement = onnxruntime.STYLE.as_rendered(graph.model, plan).placement
    assert floats(left_in_onnxruntime(tmp_path / "model.onnx")) == len(placement.float_nodes)
    assert len(placement.float_nodes) <= 5


def test_openvino_runs_the_plan_in_integers(family, tmp_path):
    graph, plan = family
    engine = to_openvino(openvino.render(graph, plan), tmp_path)
    placement = openvino.STYLE.as_rendered(graph.model, plan).placement
    assert floats(left_in_openvino(tmp_path / engine.file)) == len(placement.float_nodes)
    assert all("1x1 map" in reason for reason in placement.float_nodes.values())
