"""What the runtimes make of each family's INT8 graph: the whole plan in integers, but for what a dialect leaves out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import deploykit
from deploykit.backends.backend import resolve
from deploykit.backends.table import load_backend
from deploykit.calibration.images import calibration_set
from deploykit.calibration.plan import QuantizationPlan
from deploykit.export.trace import Everything, output_names
from deploykit.graph import OnnxGraph
from tests.backbones.realistic import randomize
from tests.calibration.networks import master_graph, plan_of
from tests.conftest_graphs import lower
from tests.small_transformers import SHORT_VIT

FAMILIES = {
    "resnet18": 64,
    "mobilenetv2_050": 64,
    "mobilenetv3_small_100": 64,
    "regnety_002": 64,
    SHORT_VIT: 64,
    "vit_tiny_patch16_224": 64,
    "convnext_tiny": 64,
    "swin_tiny_patch4_window7_224": 224,
}
SLOW = ("mobilenetv2_050", "regnety_002", "vit_tiny_patch16_224", "convnext_tiny", "swin_tiny_patch4_window7_224")


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


def left_in_float(runtime: str, graph: OnnxGraph, plan: QuantizationPlan, folder: Path) -> tuple[int, dict[str, str]]:
    """How many nodes with weights the runtime's engine runs in float, and those that its dialect keeps there."""
    backend = load_backend(runtime)
    dialect = resolve(backend.dialect)
    no_probe = np.zeros((1, *graph.input.shape[1:]), np.float32)
    engine = lower(runtime, dialect.render(graph, plan, no_probe).graph, folder)
    left = resolve(backend.inspect)(folder / engine.file)
    floats = sum(count for operator, count in left.items() if operator.startswith("float "))
    return floats, dialect.keep_float(graph.model, plan).placement.float_nodes


def test_onnxruntime_runs_the_plan_in_integers(family, tmp_path):
    found, float_nodes = left_in_float("onnxruntime", *family, tmp_path)
    assert found == len(float_nodes)
    assert len(float_nodes) <= 5


def test_openvino_runs_the_plan_in_integers(family, tmp_path):
    found, float_nodes = left_in_float("openvino", *family, tmp_path)
    assert found == len(float_nodes)
    assert all("1x1 map" in reason for reason in float_nodes.values())
