"""Exports for devices: one command for several, one plan, and what is said of a device that is not here."""

from __future__ import annotations

import platform
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

import deploykit
from deploykit.bundle import read_manifest, write_manifest
from deploykit.errors import BundleError, CalibrationError, ExportError, SpecError, TargetWarning
from deploykit.export.measure import PROXY
from deploykit.export.target_options import targets_here
from deploykit.parity.report import ELSEWHERE
from deploykit.processor import this_processor
from deploykit.progress import ImagesCalibrated
from deploykit.target import targets

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="names processors that this one is not")
TWO = ("rpi5", "intel-n100")
HERE = {"raspberry-pi-5": "onnxruntime", "intel-n100": "openvino"}


class Tiny(torch.nn.Module):
    """Two convolutions and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.body = torch.nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.head = torch.nn.Linear(16, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.stem(images).relu()).relu().mean((2, 3)))


@pytest.fixture(scope="module")
def network() -> dict[str, object]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return {"name": Tiny().eval(), "image_size": 32}


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).normal(size=(16, 3, 32, 32)).astype(np.float32)


@pytest.fixture(scope="module")
def exported(network, images, tmp_path_factory):
    """The bundles of two devices that are not here, and what was calibrated for them."""
    folder, seen = tmp_path_factory.mktemp("targets") / "out", []
    results = deploykit.export_targets(
        network["name"],
        folder,
        targets=TWO,
        calibration=images,
        image_size=32,
        time_against_fp32=True,
        progress=lambda event: seen.append(event) if isinstance(event, ImagesCalibrated) else None,
    )
    return folder, results, seen


def test_each_target_gets_its_bundle_by_its_own_runtime(exported):
    folder, results, _ = exported
    assert {name: result.manifest.runtime for name, result in results.items()} == HERE
    for name in HERE:
        manifest = read_manifest(folder / name)
        assert (manifest.target, manifest.precision, manifest.input.batch) == (name, "int8", 1)
        assert manifest.made_for.instructions == targets()[name].instructions


def test_targets_with_equal_settings_are_calibrated_once(exported, images):
    _, _, seen = exported
    assert [event.done for event in seen][-1] == len(images)
    assert len([event for event in seen if event.done == len(images)]) == 1


def test_a_device_that_is_not_here_gets_numbers_but_no_time_and_no_status(exported):
    _, results, _ = exported
    for result in results.values():
        assert (result.status, result.speed, result.manifest.speedup) == ("built", None, None)
        assert "device" not in result.manifest.seen_on
        assert {level.measured_on for level in result.parity.levels} == {
            PROXY if this_processor().saturates else ELSEWHERE
        }
        assert result.parity.passed


def test_opening_it_here_says_what_it_is_for(exported):
    folder, _, _ = exported
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        deploykit.load_bundle(folder / "raspberry-pi-5").close()
    (message,) = [str(each.message) for each in told if issubclass(each.category, TargetWarning)]
    assert "made for Raspberry Pi 5, which is aarch64, and this machine is x86_64" in message


def test_a_bundle_is_asked_for_by_any_name_of_its_target(exported):
    folder, _, _ = exported
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        deploykit.create_backbone(folder / "raspberry-pi-5", target="pi5").close()
    with pytest.raises(SpecError, match="target='rpi4', and the bundle has 'raspberry-pi-5'"):
        deploykit.create_backbone(folder / "raspberry-pi-5", target="rpi4")


def test_int8_of_a_target_needs_images(network, tmp_path):
    with pytest.raises(CalibrationError, match="int8 needs images"):
        deploykit.export_backbone(**network, output=tmp_path / "a", target="rpi5")


def test_a_target_twice_is_refused(network, tmp_path):
    with pytest.raises(SpecError, match="the target raspberry-pi-5 was given twice"):
        deploykit.export_targets(network["name"], tmp_path, targets=["rpi5", "pi5"])


OWN = """
title = "A board"
machine = "x86_64"
instructions = []
processor = "x86-vnni"
precision = "fp32"
[[runtime]]
name = "openvino"
options = { NUM_STREAMS = "1" }
"""


def test_one_target_that_fails_is_named_and_leaves_the_others(tmp_path):
    (tmp_path / "small.toml").write_text("memory_mb = 1\n" + OWN)
    (tmp_path / "board.toml").write_text(OWN)
    wide = torch.nn.Sequential(torch.nn.Conv2d(3, 600, 3), torch.nn.ReLU(), torch.nn.Conv2d(600, 60, 3))
    with pytest.raises(
        ExportError, match=r"1 of 2 targets failed\. Written: board\.\n  small: the engine's files take 1\.\d MB"
    ):
        deploykit.export_targets(
            wide,
            tmp_path / "out",
            targets=[str(tmp_path / "small.toml"), str(tmp_path / "board.toml")],
            image_size=16,
        )
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["board"]
    manifest = read_manifest(tmp_path / "out/board")
    assert (manifest.status, manifest.target) == ("parity_checked", "board"), "this machine is the target"
    with deploykit.load_bundle(tmp_path / "out/board") as model:
        assert model._compiled.get_property("NUM_STREAMS") == 1


def test_a_manifest_cannot_set_what_no_target_may(exported, tmp_path):
    folder, results, _ = exported
    manifest = results["intel-n100"].manifest
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in manifest.files:
        (copy / name).write_bytes((folder / "intel-n100" / name).read_bytes())
    made_for = replace(manifest.made_for, options={"CACHE_DIR": "elsewhere"})
    write_manifest(copy, replace(manifest, made_for=made_for))
    with pytest.raises(BundleError, match="sets 'CACHE_DIR' of openvino, which no target may"):
        deploykit.load_bundle(copy)


@pytest.mark.slow
@pytest.mark.parametrize("name", targets())
def test_every_target_exports(name, network, images, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    result = deploykit.export_backbone(**network, output=tmp_path / name, target=name, calibration=images)
    here = name in targets_here()
    assert result.status == ("parity_checked" if here else "built")
    assert result.manifest.target == name
    assert result.manifest.runtime == targets()[name].runtimes[0]
    assert result.parity.passed
