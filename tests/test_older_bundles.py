"""Bundles that version 0.1.0 wrote, one per runtime: they open, run and verify."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import deploykit
from deploykit.bundle import open_bundle, read_manifest
from deploykit.errors import DeviceUnavailable, IncompatibleEngine

BUNDLES = Path(__file__).parent / "data" / "bundles-0.1.0"
RUN_HERE = ("onnxruntime-int8", "openvino-int8", "torch_compile-fp32")


@pytest.mark.parametrize("name", sorted(path.name for path in BUNDLES.iterdir()))
def test_every_byte_and_the_manifest_are_read(name: str):
    manifest = open_bundle(BUNDLES / name)
    assert manifest.tools["deploykit"] == "0.1.0"
    assert [level.name for level in manifest.backbone.levels] == ["stem", "stage1"]


@pytest.mark.parametrize("name", RUN_HERE)
def test_it_opens_and_verifies(name: str):
    pytest.importorskip({"torch_compile-fp32": "torch"}.get(name, name.partition("-")[0]))
    try:
        report = deploykit.verify_bundle(BUNDLES / name)
    except IncompatibleEngine as error:
        if "compiled for" in str(error) or "exactly" in str(error):
            pytest.skip(f"machine code for another processor or another torch: {error}")
        raise
    assert report.passed
    assert {level.name for level in report.levels} == {"stem", "stage1"}


@pytest.mark.parametrize("name", ["onnxruntime-int8", "openvino-int8"])
def test_create_backbone_takes_its_path(name: str):
    with deploykit.create_backbone(BUNDLES / name) as model:
        features = model(np.zeros((1, 3, 32, 32), np.float32))
    assert features["stage1"].shape == (1, 16, 8, 8)


def test_a_portable_plan_asks_for_its_device():
    manifest = read_manifest(BUNDLES / "tensorrt-int8")
    assert manifest.status == "built"
    with pytest.raises((DeviceUnavailable, deploykit.MissingDependency)):
        deploykit.load_bundle(BUNDLES / "tensorrt-int8")
