"""Every family in the runtimes for phones and boards: FP32 to rounding, and INT8 as the plan gives it elsewhere.

Numbers are held against the same network in double precision: another runtime's float32 has rounding of its own. Of
MobileNetV2 at 64 pixels with these weights, each of torch, ONNX Runtime, LiteRT and ExecuTorch keeps 91.5 to 93.1 dB of
the fourth stage, and ONNX Runtime and LiteRT 89.8 of each other.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import deploykit
from deploykit.backends.backend import resolve
from deploykit.backends.table import load_backend
from deploykit.calibration.images import calibration_set
from deploykit.export.trace import Everything, output_names
from tests.backbones.realistic import randomize, settle
from tests.backbones.smallest import SMALLEST
from tests.backends.integer_engine import integer_engine, losses
from tests.calibration.conftest import Case
from tests.calibration.networks import both_forms, plan_of
from tests.conftest_graphs import lower, made_once, manifest_of, open_engine, sqnr_db

RUNTIMES = ("litert", "executorch")
SIDE, IMAGES = 64, 8
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=SMALLEST)
def family(request, photographs) -> tuple[str, Case]:
    """The smallest network of a family, its plan and its images."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = randomize(deploykit.create_backbone(request.param, image_size=SIDE)).eval()
    images = calibration_set(photographs, backbone.input_spec).sample(IMAGES)
    if any(isinstance(module, torch.nn.BatchNorm2d) for module in backbone.modules()):
        settle(backbone, torch.from_numpy(images))
    master = both_forms(Everything(backbone), output_names(backbone), images)
    plan = plan_of(master.onnx, images)
    return request.param, Case(graph=master.onnx, program=master.torch, images=images, plan=plan)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_every_level_keeps_90_db_in_fp32(runtime, family):
    name, case = family
    graph = resolve(load_backend(runtime).dialect).render(case.program, None, case.images).graph
    engine, folder = made_once(f"{runtime}-fp32-{name}", lambda folder: lower(runtime, graph, folder))
    with open_engine(manifest_of(runtime, graph, engine), folder) as model:
        runs = [model._run(image[None]) for image in case.images]
    found = [np.concatenate(parts) for parts in zip(*runs, strict=True)]
    kept = [sqnr_db(expected, own) for expected, own in zip(case.exact(), found, strict=True)]
    assert min(kept) >= 90, kept


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_every_level_of_int8_is_within_1_db_of_the_same_plan(runtime, family):
    name, case = family
    behind = losses(integer_engine(runtime, case, name))
    assert max(behind) <= 1, behind
