from dataclasses import replace

import numpy as np
import pytest
import torch

from deploykit import create_backbone, export_backbone
from deploykit.calibration.images import calibration_set
from deploykit.calibration.plan import QuantizationPlan
from deploykit.export.job import ExportJob
from deploykit.export.tuning import tuning
from deploykit.options import ExportOptions
from deploykit.progress import TuningStep, quiet
from deploykit.spec import InputSpec, Int8
from tests.backbones.realistic import randomize

SETTINGS = Int8(recipe="distilled", calibrator="minmax", distill_steps=10, min_sqnr_db=0.0, distill_for_runtime=False)


@pytest.fixture(scope="module")
def backbone():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomize(create_backbone("mobilenetv2_050", image_size=32, num_classes=10)).eval()


@pytest.fixture(scope="module")
def images(photographs):
    whole = calibration_set(photographs, InputSpec(height=64, width=64)).sample(6)
    return np.concatenate([whole[:, :, top : top + 32, left : left + 32] for top in (0, 32) for left in (0, 32)])


def export(backbone, images, folder, runtime):
    heard = []
    result = export_backbone(
        *(backbone, folder),
        runtime=runtime,
        precision=SETTINGS,
        calibration=images,
        progress=lambda event: isinstance(event, TuningStep) and heard.append(event),
    )
    return result, heard


@pytest.mark.slow
def test_a_plan_is_tuned_once_for_every_runtime(backbone, images, tmp_path):
    result, heard = export(backbone, images, tmp_path / "first", "onnxruntime")
    assert [event.step for event in heard] == list(range(11))
    assert heard[-1].sqnr_db >= heard[0].sqnr_db  # whether it gains is tried in tests/calibration/test_distillation.py
    settings = result.manifest.precision_settings
    assert (settings["rounding"], settings["distill_steps"]) == ("distilled", 10)
    plan = QuantizationPlan.load(tmp_path / "first")
    other, silent = export(backbone, images, tmp_path / "other", "openvino")
    assert not silent  # the plan was made before
    assert QuantizationPlan.load(tmp_path / "other").key == plan.key
    assert other.status == "parity_checked"


def test_it_is_for_one_runtime_unless_it_is_to_be_for_all(backbone, images):
    own = ExportOptions(runtime="openvino", precision=Int8(rounding="distilled"))
    common = replace(own, precision=replace(own.precision, distill_for_runtime=False))
    plain = replace(common, precision=Int8())
    found = [tuning(ExportJob(backbone=backbone, options=options), None, quiet) for options in (common, own, plain)]
    assert [each and each.runtime for each in found] == [None, "openvino", None]
    assert found[0] is not None
