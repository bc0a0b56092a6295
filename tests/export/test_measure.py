from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from deploykit import create_backbone
from deploykit.backbones.user_module import wrap_module
from deploykit.backends.runtime import machine
from deploykit.calibration.images import calibration_set
from deploykit.errors import DeviceUnavailable, ExportError
from deploykit.export.measure import PARITY_IMAGES, PROXY, measure, parity_images, torch_outputs
from deploykit.images.preprocess import normalize
from deploykit.spec import Fp32, InputSpec
from tests.conftest_graphs import engine_of, lower, photographs, reference, tiny_graph

SPEC = InputSpec(height=48, width=64)


def test_parity_images_without_calibration_are_reproducible_and_look_like_photographs():
    images = parity_images(None, SPEC)
    assert images.shape == (PARITY_IMAGES, 3, 48, 64)
    assert images.dtype == np.float32
    np.testing.assert_array_equal(images, parity_images(None, SPEC))
    np.testing.assert_allclose(images.std(axis=(1, 2, 3)), 1, rtol=1e-3)
    neighbours = np.corrcoef(images[..., 1:].ravel(), images[..., :-1].ravel())[0, 1]
    assert neighbours > 0.6  # white noise has 0


def test_parity_images_of_a_pixel_engine_are_the_nearest_pixels():
    found = parity_images(None, SPEC.as_pixels())
    assert (found.shape, found.dtype) == ((PARITY_IMAGES, 48, 64, 3), np.uint8)
    step = 1 / (255 * min(SPEC.preprocessing.std))
    images = parity_images(None, SPEC)
    inside = (found > 0) & (found < 255)
    difference = np.abs(normalize(found, SPEC.preprocessing) - images).transpose(0, 2, 3, 1)
    assert difference[inside].max() <= 0.51 * step
    assert inside.mean() > 0.9


def test_parity_images_come_from_the_calibration_set():
    arrays = np.random.default_rng(0).normal(size=(40, 3, 48, 64)).astype(np.float32)
    images = parity_images(calibration_set(arrays, SPEC), SPEC)
    assert len(images) == PARITY_IMAGES
    np.testing.assert_array_equal(images[[0, -1]], arrays[[0, -1]])


def test_torch_outputs_are_every_level_and_the_head():
    backbone = create_backbone("resnet18", image_size=64, num_classes=5, output_indices=(2, 4)).eval()
    images = photographs(2).repeat(2, axis=2).repeat(2, axis=3)
    outputs = torch_outputs(backbone, images)
    assert {name: array.shape for name, array in outputs.items()} == {
        "stage2": (2, 128, 8, 8),
        "stage4": (2, 512, 2, 2),
        "logits": (2, 5),
    }
    np.testing.assert_allclose(outputs["logits"], backbone(images), rtol=1e-3, atol=1e-4)


def test_an_output_whose_shape_follows_the_values_is_named():
    class Selecting(nn.Conv2d):
        def forward(self, images):
            maps = super().forward(images)
            return maps[:, maps.mean((0, 2, 3)) > 0]

    torch.manual_seed(0)
    backbone = wrap_module(Selecting(3, 16, 3), 16, in_channels=3)
    images = np.random.default_rng(0).standard_normal((4, 3, 16, 16)).astype(np.float32)
    with pytest.raises(ExportError, match=r"output '.*' of selecting has shape .* for one image and .* for another"):
        torch_outputs(backbone, images)


def measured(manifest, folder, whole, precision=None, **changes):
    images = photographs(4)
    arguments = {
        "images": images,
        "expected": dict(zip(("stem", "stage1"), reference(images), strict=True))
        | {"logits": reference(images, features_only=False)[0]},
        "precision": precision or Fp32(),
        "graph": tiny_graph(features_only=manifest.backbone.features_only),
        "whole": whole,
        "lower": partial(lower, "onnxruntime"),
    }
    return measure(manifest, folder, **(arguments | changes))


def test_an_engine_that_runs_is_compared_itself():
    report, seen = measured(*engine_of("onnxruntime"), whole=None)
    assert seen.status == "parity_checked"
    assert [(level.name, level.measured_on) for level in report.levels] == [("stem", "engine"), ("stage1", "engine")]
    assert report.passed
    assert report.images == 4
    assert seen.seen_on == machine() | {"device": "cpu", "onnxruntime": onnxruntime.__version__}


def test_an_engine_that_runs_outside_its_budget_is_executed_and_no_more():
    report, seen = measured(*engine_of("onnxruntime"), whole=None, precision=Fp32(min_sqnr_db=250))
    assert not report.passed
    assert seen.status == "executed"


def test_levels_inside_an_engine_of_the_head_are_probed():
    report, seen = measured(*engine_of("onnxruntime", features_only=False), whole=tiny_graph())
    assert seen.status == "parity_checked"
    assert [(level.name, level.measured_on) for level in report.levels] == [
        ("stem", "probe"),
        ("stage1", "probe"),
        ("logits", "engine"),
    ]


@pytest.mark.parametrize("whole", [None, tiny_graph], ids=["the engine's graph", "the whole graph"])
def test_where_the_device_is_absent_the_same_graph_is_compared_on_the_cpu(whole, monkeypatch):
    from deploykit.backends.openvino.adapter import OpenVINORuntime

    def absent(self, engine, device):
        raise DeviceUnavailable("no such device here")

    monkeypatch.setattr(OpenVINORuntime, "_open", absent)
    report, seen = measured(*engine_of("openvino"), whole=whole and whole())
    assert seen.status == "built"
    assert seen.seen_on == machine()
    assert {level.measured_on for level in report.levels} == {PROXY}
    assert [level.name for level in report.levels] == ["stem", "stage1"]
    report.raise_for_failures()


def test_wrong_numbers_fail_the_report():
    manifest, folder = engine_of("onnxruntime")
    images = photographs(4)
    wrong = {name: array * 1.01 for name, array in zip(("stem", "stage1"), reference(images), strict=True)}
    report, _ = measured(manifest, folder, None, expected=wrong)
    assert [level.name for level in report.failures()] == ["stem", "stage1"]
    relaxed, _ = measured(manifest, folder, None, precision=replace(Fp32(), min_sqnr_db=30), expected=wrong)
    assert relaxed.passed
