"""The smallest network of a family with its plan, and what its FP32 engine in a runtime for phones gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

import deploykit
from deploykit.backends.backend import resolve
from deploykit.backends.table import load_backend
from deploykit.calibration.images import calibration_set
from deploykit.export.trace import Everything, output_names
from tests.backbones.realistic import randomize, settle
from tests.calibration.conftest import Case
from tests.calibration.networks import both_forms, plan_of
from tests.conftest_graphs import lower, made_once, manifest_of, open_engine

SIDE, IMAGES = 64, 8
"""The side of the images in pixels: the least at which each level of each family has several places; and how many."""


def family_case(name: str, photographs: Path) -> Case:
    """Return a backbone with random weights, and norms that know the images, as graphs with their plan."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = randomize(deploykit.create_backbone(name, image_size=SIDE)).eval()
    images = calibration_set(photographs, backbone.input_spec).sample(IMAGES)
    if any(isinstance(module, torch.nn.BatchNorm2d) for module in backbone.modules()):
        settle(backbone, torch.from_numpy(images))
    master = both_forms(Everything(backbone), output_names(backbone), images)
    return Case(graph=master.onnx, program=master.torch, images=images, plan=plan_of(master.onnx, images))


def float_engine(runtime: str, case: Case, name: str) -> tuple[Path, list[np.ndarray]]:
    """Write the FP32 engine of a case, whose name it is kept by; return its file and what it gives for the images."""
    graph = resolve(str(load_backend(runtime).dialect)).render(case.program, None, case.images).graph
    engine, folder = made_once(f"{runtime}-fp32-{name}", lambda folder: lower(runtime, graph, folder))
    with open_engine(manifest_of(runtime, graph, engine), folder) as model:
        runs = [model._run(image[None]) for image in case.images]
    return folder / engine.file, [np.concatenate(parts) for parts in zip(*runs, strict=True)]
