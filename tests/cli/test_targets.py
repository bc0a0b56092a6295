"""``deploykit targets``: the list of devices, and what one of them decides."""

from __future__ import annotations

import pytest

from deploykit.export.target_options import targets_here
from deploykit.target import FOLDER, targets

OWN = """
# The vendor's page, table 3.
title = "A camera"
machine = "aarch64"
model = "Camera"
processor = "arm64"
precision = "int8"
batch = [1, 2, 8]
input = "uint8"
memory_mb = 64
[[runtime]]
name = "onnxruntime"
int8 = { calibrator = "mse" }
version = "1.30"
"""


def test_every_target_is_a_row_with_its_other_names(call):
    done = call("targets")
    assert done.code == 0, done.err
    for target in targets().values():
        (row,) = [line for line in done.out.splitlines() if line.startswith(f"│ {target.name} ")]
        assert all(alias in row for alias in target.aliases)
        assert target.precision in row
    assert f"This machine is: {', '.join(targets_here()) or 'none of these'}." in done.out


def test_json_has_every_target_and_which_of_them_is_here(call):
    told = call("targets", "--json").json()
    assert [each["name"] for each in told["targets"]] == list(targets())
    assert told["here"] == list(targets_here())


@pytest.mark.parametrize("name", ["raspberry-pi-5", "jetson-orin-nano", "intel-n100"])
def test_one_target_is_explained_with_the_sources_of_its_figures(call, name):
    done = call("targets", name)
    assert done.code == 0, done.err
    target = targets()[name]
    assert f"device        {target.title}" in done.out
    assert f"also          {', '.join(target.aliases) or 'no other name'}" in done.out
    written = (FOLDER / f"{name}.toml").read_text(encoding="utf-8").splitlines()
    sources = [line.lstrip("# ") for line in written if line.startswith("#")]
    assert [line.strip() for line in done.out.split("Sources:")[1].splitlines()[1:-1]] == sources
    assert done.out.splitlines()[-1] == f"Next: deploykit export resnet18 --target {name} --calibration FOLDER"
    assert call("targets", name, "--json").json()["target"]["name"] == name


def test_a_file_of_ones_own_is_explained_as_the_others(call, tmp_path):
    path = tmp_path / "camera.toml"
    path.write_text(OWN)
    done = call("targets", path)
    assert done.code == 0, done.err
    for line in (
        "also          no other name",
        "machine       aarch64, matches 'Camera'",
        "batch         1 to 8, best at 2",
        "input         pixels, uint8 (N, H, W, C)",
        "memory        64 MB for the engine's files",
    ):
        assert line in done.out
    (row,) = [line for line in done.out.splitlines() if line.startswith("│ onnxruntime ")]
    assert "1.30" in row
    assert "calibrator mse" in row
    assert "  The vendor's page, table 3." in done.out


def test_an_unknown_target_gets_the_nearest_names(call):
    done = call("targets", "raspbery-pi-5")
    assert (done.code, done.out) == (2, "")
    assert "unknown target 'raspbery-pi-5'. Did you mean 'raspberry-pi-5'" in done.err
