"""The Core ML adapter: refused by name on other systems; on macOS the numbers."""

from __future__ import annotations

import dataclasses
import platform
import subprocess
import sys

import numpy as np
import pytest

from deploykit.backends.coreml.adapter import CoreMLRuntime, check_ends
from deploykit.backends.coreml.mil_program import read_program
from deploykit.backends.table import load_backend
from deploykit.errors import BundleError, DeviceUnavailable, SpecError
from tests.conftest_graphs import engine_of, open_engine, photographs, reference, sqnr_db

elsewhere = pytest.mark.skipif(platform.system() == "Darwin", reason="this is macOS, which runs Core ML")
on_macos = pytest.mark.skipif(platform.system() != "Darwin", reason=f"Core ML is absent on {platform.system()}")


@elsewhere
def test_other_systems_are_told_which_machine_opens_it(residual_package):
    with pytest.raises(DeviceUnavailable, match=r"coreml runs on macOS, and this machine has \w+.*open it there"):
        open_engine(residual_package.manifest, residual_package.folder)
    assert CoreMLRuntime.devices() == ()


@elsewhere
def test_looking_for_the_package_does_not_import_it():
    code = (
        "import sys; from deploykit.backends.table import load_backend; backend = load_backend('coreml'); "
        "backend.check_installed(); print(backend.load_devices()(), 'coremltools' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[0] == "() False"


def test_systems_of_other_runtimes_are_any():
    assert load_backend("onnxruntime").has_system
    load_backend("onnxruntime").check_system()


def test_ends_that_the_manifest_does_not_describe_are_refused(residual_package):
    manifest, program = residual_package.manifest, read_program(residual_package.path)
    assert check_ends(program, manifest).name == "images"
    for change in ({"height": 32}, {"name": "pixels"}):
        other = dataclasses.replace(manifest, input=dataclasses.replace(manifest.input, **change))
        with pytest.raises(BundleError, match=r"has the inputs images \(1, 3, 64, 64\).*export the bundle again"):
            check_ends(program, other)
    more = (*manifest.outputs, dataclasses.replace(manifest.outputs[0], name="stage9"))
    with pytest.raises(BundleError, match=r"outputs logits, stage1, stage2; the manifest names also stage9"):
        check_ends(program, dataclasses.replace(manifest, outputs=more))


@on_macos
@pytest.mark.parametrize("device", ["auto", *CoreMLRuntime.devices()])
def test_features_equal_torch_on_every_device(device: str):
    images = photographs(3)
    with open_engine(*engine_of("coreml"), device=device) as model:
        features = model(images)
    for expected, actual in zip(reference(images), features.values(), strict=True):
        assert actual.shape == expected.shape
        assert actual.dtype == np.float32
        assert sqnr_db(expected, actual) >= 60


@on_macos
def test_threads_and_unknown_devices_are_refused():
    with pytest.raises(DeviceUnavailable, match="coreml has no device 'npu' here; it has all"):
        open_engine(*engine_of("coreml"), device="npu")
    manifest, folder = engine_of("coreml")
    with pytest.raises(SpecError, match="its own number of threads"):
        CoreMLRuntime(manifest, folder, threads=2)
