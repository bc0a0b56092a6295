"""What the runtimes make of each family's INT8 graph: the whole plan in integers, but for what a dialect leaves out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import deploykit
from deploykit.backends.backend import LowerOptions, resolve
from deploykit.backends.table import load_backend
from deploykit.calibration.images import calibration_set
from deploykit.export.trace import Everything, output_names
from tests.backbones.realistic import randomize
from tests.calibration.networks import master_graph, plan_of, written

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


def left_in_float(runtime, graph, plan, folder) -> tuple[int, dict[str, str]]:
    """How many weighted nodes a runtime computes in float, and those that its dialect keeps so, with the reasons."""
    backend = load_backend(runtime)
    dialect = resolve(backend.dialect)
    engine = resolve(backend.lower)(replace(graph, model=written(dialect, graph, plan)), folder, LowerOptions())
    kept = dialect.keep_float(graph.model, plan).placement.float_nodes
    return floats(resolve(backend.inspect)(folder / engine.file)), kept


def test_onnxruntime_runs_the_plan_in_integers(family, tmp_path):
    left, kept = left_in_float("onnxruntime", *family, tmp_path)
    assert left == len(kept)
    assert len(kept) <= 5


def test_openvino_runs_the_plan_in_integers(family, tmp_path):
    left, kept = left_in_float("openvino", *family, tmp_path)
    assert left == len(kept)
    assert all("1x1 map" in reason for reason in kept.values())
