from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import deploykit
from deploykit import create_backbone
from deploykit.calibration.images import calibration_set
from deploykit.errors import CalibrationError, SpecError
from deploykit.export.job import ExportJob, checked
from deploykit.options import ExportOptions
from deploykit.spec import BatchRange, BuildOptions, Fp16, Fp32, Int8
from tests.backbones.realistic import randomize
from tests.small_resnet import SMALL


def backbone_of(**options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomize(create_backbone(SMALL, **{"image_size": 64, **options})).eval()


@pytest.fixture(scope="module")
def backbone():
    return backbone_of(num_classes=10)


@pytest.fixture(scope="module")
def images(backbone):
    arrays = np.random.default_rng(1).normal(size=(2, 3, 64, 64)).astype(np.float32)
    return calibration_set(arrays, backbone.input_spec)


def job_of(backbone, images=None, **options) -> ExportJob:
    return ExportJob(backbone=backbone, options=ExportOptions(**{"runtime": "onnxruntime", **options}), images=images)


@pytest.mark.parametrize(
    ("runtime", "message"),
    [
        ("torch", r"no engine to export.*onnxruntime"),
        ("openvin", r"unknown runtime 'openvin'\. Did you mean 'openvino'"),
    ],
)
def test_a_runtime_that_makes_no_engine_is_refused(backbone, runtime, message):
    with pytest.raises(SpecError, match=message):
        checked(job_of(backbone, runtime=runtime))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": Int8(float_dtype="fp16")}, "no int8 with fp16 beside it; it has fp32"),
        ({"precision": Int8(recipe="autoo")}, "unknown recipe 'autoo'"),
        ({"target": "x86-avx3"}, "unknown onnxruntime target 'x86-avx3'.*'x86-avx2'"),
        ({"portable": True}, "onnxruntime has no portable form; tensorrt has one"),
        ({"build": BuildOptions(version_compatible=True)}, "builds for onnxruntime take no such options"),
        ({"runtime": "tensorrt", "portable": True, "target": "sm89"}, "were both given; a portable engine"),
    ],
)
def test_an_option_that_the_runtime_lacks_is_refused(backbone, images, options, message):
    if options.get("runtime") == "tensorrt":
        pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    with pytest.raises(SpecError, match=message):
        checked(job_of(backbone, images, **options))


def test_int8_without_images_is_refused(backbone):
    with pytest.raises(CalibrationError, match="Random data is never used"):
        checked(job_of(backbone, precision=Int8()))


def test_a_top1_budget_needs_logits(backbone):
    features = backbone_of(features_only=True, output_indices=(4,))
    with pytest.raises(SpecError, match="needs logits, and this engine gives stage4"):
        checked(job_of(features, precision=Fp32(min_top1_agreement=0.9)))
    assert checked(job_of(backbone, precision=Fp32(min_top1_agreement=0.9)))


def test_the_target_decides_whether_the_range_is_reduced_unless_it_is_given(backbone, images):
    def reduced(**options) -> bool | None:
        return checked(job_of(backbone, images, **options)).options.precision.reduce_range

    assert reduced(precision=Int8(), target="x86-avx2") is True
    assert reduced(precision=Int8(), target="x86-vnni") is False
    assert reduced(precision=Int8(reduce_range=False), target="x86-avx2") is False
    assert reduced(precision=Int8(reduce_range=True), target="x86-vnni") is True


def test_the_input_is_the_backbones_with_the_batch_and_the_layout_asked_for(backbone):
    job = job_of(backbone, batch=BatchRange(), embed_preprocessing=True)
    assert job.input == replace(backbone.input_spec, batch=BatchRange()).as_pixels()
    assert job_of(backbone).input == replace(backbone.input_spec, batch=1)


def test_every_part_of_a_job_is_in_the_cache_key(backbone, images, monkeypatch):
    arrays = np.stack(list(images.images()))

    def key(**changes):
        fields = {"backbone": backbone, **changes}
        return json.dumps(job_of(**fields).cache_parts(), sort_keys=True, default=str)

    keys = {
        key(),
        key(backbone=backbone_of(num_classes=11)),
        key(backbone=randomize(backbone_of(num_classes=10), seed=3)),
        key(runtime="openvino"),
        key(precision=Fp16()),
        key(precision=Fp32(min_sqnr_db=90)),
        key(batch=2),
        key(batch=BatchRange()),
        key(batch=BatchRange(max=16)),
        key(images=images),
        key(images=calibration_set(arrays[:1], backbone.input_spec)),
        key(target="sm89"),
        key(portable=True),
        key(embed_preprocessing=True),
        key(build=BuildOptions(version_compatible=True)),
        key(precision=Int8()),
        key(precision=Int8(calibrator="mse")),  # the recipe's own may be another
    }
    assert len(keys) == 17
    assert key() in keys
    monkeypatch.setattr(deploykit, "__version__", "99")
    assert key() not in keys
