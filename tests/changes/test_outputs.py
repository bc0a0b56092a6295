"""Which images two bundles are compared on."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from deploykit.bundle import read_manifest, write_manifest
from deploykit.changes.comparison import compare_bundles
from deploykit.parity.reference import ParityReference

INT8 = Path(__file__).parent.parent / "data" / "bundles-0.1.0" / "onnxruntime-int8"


@pytest.fixture
def said_to_be_fp32(tmp_path) -> Path:
    """The same engine, said to be FP32, with only three of the images."""
    folder = shutil.copytree(INT8, tmp_path / "fp32")
    kept = ParityReference.load(folder / "reference.npz")
    expected = {name: np.ascontiguousarray(values[:3]) for name, values in kept.expected.items()}
    dataclasses.replace(kept, images=kept.images[:3], expected=expected).save(folder / "reference.npz")
    manifest = read_manifest(folder)
    for name in ("manifest.json", "manifest.sha256"):
        (folder / name).unlink()
    write_manifest(folder, dataclasses.replace(manifest, precision="fp32", precision_settings={"min_sqnr_db": 30.0}))
    return folder


def test_int8_beside_float_is_judged_on_images_like_its_calibration(said_to_be_fp32):
    images = len(ParityReference.load(INT8 / "reference.npz"))
    assert compare_bundles(said_to_be_fp32, INT8).images == images
    assert compare_bundles(INT8, said_to_be_fp32).images == images
    assert compare_bundles(said_to_be_fp32, said_to_be_fp32).images == 3
