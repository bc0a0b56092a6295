"""Targets and processors of INT8 engines: coarser weights where products of others saturate."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deploykit import processor
from deploykit.backends import runtime as adapters
from deploykit.backends.table import load_backend
from deploykit.bundle import read_manifest
from deploykit.calibration.images import calibration_set
from deploykit.calibration.plan import QuantizationPlan
from deploykit.errors import SaturationWarning, SpecError
from deploykit.export.job import ExportJob, checked
from deploykit.facade import create_backbone, export_backbone
from deploykit.loading import load_bundle
from deploykit.options import ExportOptions
from deploykit.processor import Processor
from deploykit.spec import Fp32, Int8
from tests.backbones.realistic import randomize
from tests.small_resnet import SMALL

OLD = Processor(model="Old Xeon", cores=1, int8=("AVX2",), absent=("AVX512-VNNI", "AVX-VNNI", "AMX-INT8"))
NEW = Processor(model="New Xeon", cores=1, int8=("AVX2", "AVX512-VNNI"), absent=("AVX-VNNI", "AMX-INT8"))


def put_in(monkeypatch, chip: Processor) -> None:
    """Let this machine have a processor."""
    for module in (processor, adapters):
        monkeypatch.setattr(module, "this_processor", lambda: chip)


@pytest.fixture(scope="module")
def backbone():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomize(create_backbone(SMALL, image_size=32, num_classes=10)).eval()


@pytest.fixture(scope="module")
def job(backbone, photographs) -> ExportJob:
    """What is exported, for a test to fill in how."""
    images = calibration_set(photographs, backbone.input_spec)
    return ExportJob(backbone=backbone, options=ExportOptions(runtime="onnxruntime"), images=images)


@pytest.fixture(scope="module")
def bundles(backbone, photographs, tmp_path_factory) -> dict[str, Path]:
    """One engine for each target."""
    made = {}
    for target in ("x86-avx2", "x86-vnni"):
        made[target] = tmp_path_factory.mktemp("bundles") / target
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SaturationWarning)  # the processor of this machine may be an old one
            export_backbone(
                backbone, made[target], runtime="openvino", precision="int8", calibration=photographs, target=target
            )
    return made


def test_the_target_decides_and_the_bundle_says_it(bundles):
    for target, reduced in (("x86-avx2", True), ("x86-vnni", False)):
        manifest = read_manifest(bundles[target])
        assert manifest.target == target
        assert manifest.precision_settings["reduce_range"] is reduced
        assert QuantizationPlan.load(bundles[target]).reduce_range is reduced


def test_weights_of_all_8_bits_on_a_processor_without_vnni_are_warned_of(bundles, monkeypatch):
    put_in(monkeypatch, OLD)
    with pytest.warns(SaturationWarning, match=r"can saturate on this processor \(Old Xeon.*target='x86-avx2'"):
        load_bundle(bundles["x86-vnni"]).close()


@pytest.mark.parametrize(("target", "chip"), [("x86-avx2", OLD), ("x86-avx2", NEW), ("x86-vnni", NEW)])
def test_where_nothing_saturates_nothing_is_said(target, chip, bundles, monkeypatch):
    put_in(monkeypatch, chip)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_bundle(bundles[target]).close()


@pytest.mark.parametrize(
    ("runtime", "target", "chip", "expected"),
    [
        ("onnxruntime", None, OLD, True),
        ("onnxruntime", None, NEW, False),
        ("openvino", "x86-avx512", NEW, True),
        ("openvino", "arm64", OLD, False),
        ("torch_compile", None, OLD, True),
        ("tensorrt", None, OLD, False),
    ],
)
def test_what_is_left_open_follows_the_target_or_this_processor(runtime, target, chip, expected, job, monkeypatch):
    pytest.importorskip(load_backend(runtime).package.module, reason=f"{runtime} is not installed")
    put_in(monkeypatch, chip)
    options = ExportOptions(runtime=runtime, precision=Int8(), target=target)
    assert checked(replace(job, options=options)).options.precision == Int8(reduce_range=expected)


def test_what_is_asked_for_is_kept(job, monkeypatch):
    put_in(monkeypatch, OLD)
    for asked in (Int8(reduce_range=False), Int8(reduce_range=True), Fp32()):
        options = ExportOptions(runtime="onnxruntime", precision=asked, target="x86-vnni")
        assert checked(replace(job, options=options)).options.precision == asked


def test_an_unknown_processor_gets_the_nearest_spelling(job):
    with pytest.raises(SpecError, match=r"unknown openvino target .x86-vni.\. Did you mean .x86-vnni."):
        checked(replace(job, options=ExportOptions(runtime="openvino", target="x86-vni")))
    with pytest.raises(SpecError, match=r"unknown torch_compile target .x86-vnni."):
        checked(replace(job, options=ExportOptions(runtime="torch_compile", target="x86-vnni")))
