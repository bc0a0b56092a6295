"""A runtime that another package adds by one folder and one entry point: nothing else knows of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import deploykit
from deploykit.backends import table
from deploykit.cli import doctor
from deploykit.spec import Int8

ROOT = Path(__file__).parent.parent.parent
NAME = "onnx_reference"
SIDE = 32


def declare(folder: Path, name: str, value: str, *, package: str = "deploykit-onnx-reference") -> Path:
    """Write what an installed package leaves in site-packages: its metadata with an entry point."""
    info = folder / f"{package.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{table.ENTRY_POINTS}]\n{name} = {value}\n")
    return folder


@pytest.fixture
def on_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Entry points are read anew in the test, and again after it."""
    table._entry_points.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    table._entry_points.cache_clear()


@pytest.fixture
def installed(tmp_path: Path, on_path: pytest.MonkeyPatch) -> Path:
    site = declare(tmp_path / "site", NAME, "tests.backends.onnx_reference.backend:BACKEND")
    on_path.syspath_prepend(str(site))
    return site


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.ReLU())
        self.head = nn.Linear(8, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.stem(images).mean((2, 3)))


def images(count: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, 3, SIDE, SIDE)).astype(np.float32)


@pytest.fixture
def module() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Small().eval()


def test_it_is_listed_after_the_table(installed: Path):
    assert table.backend_names() == (*table.BACKENDS, NAME)
    assert NAME in table.engine_names()


def test_create_backbone_gives_its_numbers(installed: Path, module: nn.Module):
    batch = images(1)
    engine = deploykit.create_backbone(module, runtime=NAME, image_size=SIDE)
    assert engine.runtime == NAME
    expected = module(torch.from_numpy(batch)).detach().numpy()
    np.testing.assert_allclose(engine(batch), expected, rtol=1e-4, atol=1e-5)


def test_int8_export_is_compared_timed_and_verified(installed: Path, module: nn.Module, tmp_path: Path):
    result = deploykit.export_backbone(
        module,
        tmp_path / "bundle",
        runtime=NAME,
        precision=Int8(min_sqnr_db=20.0),
        calibration=images(24),
        image_size=SIDE,
        time_against_fp32=True,
    )
    assert result.status == "parity_checked"
    assert result.speed is not None and result.speed.fp32_ms > 0 and result.speed.int8_ms > 0
    assert 20 < min(level.sqnr_db for level in result.parity.levels) < 60
    assert deploykit.verify_bundle(tmp_path / "bundle").passed


def test_a_precision_that_it_lacks_is_refused(installed: Path, module: nn.Module):
    with pytest.raises(deploykit.SpecError, match="onnx_reference runtime has no fp16; it has fp32, int8"):
        deploykit.create_backbone(module, runtime=NAME, precision="fp16", image_size=SIDE)


def test_the_command_line_knows_it(installed: Path, module: nn.Module, tmp_path: Path):
    deploykit.export_backbone(module, tmp_path / "bundle", runtime=NAME, image_size=SIDE)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(installed), str(ROOT)])}

    def told(*arguments: str) -> dict:
        command = [sys.executable, "-m", "deploykit", *arguments, "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=ROOT)
        return json.loads(done.stdout)

    assert told("verify", str(tmp_path / "bundle"))["passed"]


def test_doctor_asks_it_for_its_devices(installed: Path, on_path: pytest.MonkeyPatch):
    assert NAME in doctor.backend_names()
    on_path.setenv("PYTHONPATH", str(installed))
    on_path.setattr(doctor, "backend_names", lambda: (NAME,))
    (row,) = doctor.examine().runtimes
    assert (row.runtime, row.devices, row.problem) == (NAME, ("cpu",), None)


def test_two_packages_of_one_name_are_refused(installed: Path, tmp_path: Path, on_path: pytest.MonkeyPatch):
    other = declare(tmp_path / "other", NAME, "elsewhere:BACKEND", package="another-package")
    on_path.syspath_prepend(str(other))
    table._entry_points.cache_clear()
    with pytest.raises(deploykit.DeployKitError, match="two packages name a runtime 'onnx_reference'"):
        table.backend_names()


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("no_such_module:BACKEND", "does not load: No module named 'no_such_module'"),
        ("tests.backends.onnx_reference.backend:PACKAGES", "expected a Backend named 'broken'"),
        ("tests.backends.onnx_reference.backend:BACKEND", "expected a Backend named 'broken'"),
    ],
)
def test_an_entry_point_that_is_no_backend_is_named(tmp_path: Path, on_path: pytest.MonkeyPatch, value: str, said: str):
    on_path.syspath_prepend(str(declare(tmp_path / "site", "broken", value)))
    with pytest.raises(deploykit.DeployKitError, match=said):
        table.load_backend("broken")
