"""``deploykit export``: bundles, plans, progress, and what it refuses."""

from __future__ import annotations

import functools
import json
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import deploykit
from deploykit.bundle import read_manifest
from tests.small_resnet import SMALL

HERE = ("--runtime", "onnxruntime", "--image-size", "64")


def test_a_checkpoint_becomes_a_bundle_and_the_last_lines_say_what_is_next(call, tmp_path, monkeypatch):
    model = deploykit.create_backbone(SMALL, num_classes=7)
    torch.save(model.state_dict(), tmp_path / "mine.pth")
    monkeypatch.chdir(tmp_path)
    words = ("--runtime", "onnxruntime", "--num-classes", "7", "--image-size", "48x64")
    done = call("export", "mine.pth", "--backbone", SMALL, *words)
    assert done.code == 0, done.err
    folder = f"{SMALL}-onnxruntime-fp32"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["mine.pth", folder]
    assert "status parity_checked" in done.out
    assert all(f"│ {level} " in done.out for level in ("stem", "stage4", "logits"))
    assert done.out.splitlines()[-2:] == [f"Next: deploykit verify {folder}", f"      deploykit run {folder} IMAGE"]
    told = [line for line in done.err.splitlines() if line.startswith("warning: ")]
    assert [line.split(" so the")[0] for line in told] == [
        "warning: mine.pth does not say how its images were prepared,"
    ]
    stages = [line for line in done.err.splitlines() if line not in told]
    assert [line.split("] ")[0][-3:] for line in stages] == [f"{count}/9" for count in range(1, 10)]
    manifest = read_manifest(tmp_path / folder)
    assert manifest.backbone.weights == "mine.pth"
    assert (manifest.backbone.num_classes, manifest.input.height, manifest.input.width) == (7, 48, 64)
    assert call("verify", folder).code == 0


def test_int8_settings_reach_the_bundle(exported_features):
    folder, done = exported_features
    told = done.json()
    manifest = read_manifest(folder)
    assert told["status"] == "parity_checked"
    assert told["manifest"]["weights_digest"] == manifest.weights_digest
    assert [level["name"] for level in told["parity"]["levels"]] == ["stage2", "stage3"]
    assert (told["parity"]["min_sqnr_db"], told["parity"]["images"]) == (20, 4)
    assert manifest.precision == "int8"
    assert manifest.precision_settings["calibrator"] == "minmax"
    assert (manifest.input.batch.min, manifest.input.batch.opt, manifest.input.batch.max) == (1, 2, 4)
    assert "calibrated 4 of 4 images" in done.err


def test_a_dry_run_tells_the_plan_and_builds_nothing(call, tmp_path, photos):
    out = tmp_path / "out"
    words = ("export", "resnet50", "--runtime", "openvino", "--precision", "int8", "--calibration", photos)
    text = call(*words, "--features-only", "--output-indices", "2,3,4", "-o", out, "--dry-run")
    assert text.code == 0, text.err
    assert "stage2, stage3, stage4" in text.out
    assert "4 images" in text.out
    told = call(*words, "--batch-size", "dynamic", "-o", out, "--dry-run", "--json").json()["plan"]
    assert told["backbone"]["name"] == "resnet50"
    assert told["outputs"] == ["logits"]
    assert told["input"]["batch"] == {"min": 1, "opt": 1, "max": 8}
    assert told["calibration_images"] == 4
    assert not list(tmp_path.iterdir())


def test_a_dry_run_decodes_the_calibration_images(call, tmp_path, photos):
    folder = shutil.copytree(photos, tmp_path / "photos")
    (folder / "torn.jpg").write_bytes(next(folder.glob("*.jpg")).read_bytes()[:900])
    words = ("export", SMALL, "--runtime", "openvino", "--precision", "int8", "--calibration", folder, "--dry-run")
    done = call(*words, "-o", tmp_path / "out")
    assert done.code == 2
    assert "torn.jpg" in done.err
    told = call(*words, "-o", tmp_path / "out", "--skip-corrupt", "--json").json()["plan"]
    assert told["calibration_images"] == 4


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (("--runtime", "onnx"), "Did you mean 'onnxruntime'?"),
        (("--runtime", "TFLite"), "Did you mean 'litert'?"),
        (("--runtime", "onnxruntime", "--precision", "int9"), "Did you mean 'int8'?"),
    ],
)
def test_what_people_call_it_is_suggested(call, tmp_path, words, meant):
    done = call("export", SMALL, *words, "-o", tmp_path / "out", "--dry-run")
    assert (done.code, meant in done.err) == (2, True), done.err


def test_a_dry_run_takes_upper_case_and_tells_the_size(call, tmp_path):
    words = ("--runtime", "OpenVINO", "--precision", "FP16", "--num-classes", "0", "-o", tmp_path / "out")
    done = call("export", "resnet18", *words, "--dry-run")
    assert done.code == 0, done.err
    assert "about 22.4 MB of weights" in done.out


def test_a_dry_run_tries_whether_the_folder_can_be_written(call, tmp_path):
    (tmp_path / "file").touch()
    places = [tmp_path / "file" / "out", *([Path("/proc/out")] if Path("/proc").is_dir() else [])]
    for place in places:
        done = call("export", SMALL, *HERE, "-o", place, "--dry-run")
        assert done.code == 2
        assert "is not a folder that can be written to" in done.err


@pytest.fixture
def corrupt(tmp_path_factory, photos):
    """Two photographs, and one file cut short."""
    folder = tmp_path_factory.mktemp("corrupt")
    for name in ("coffee", "chelsea"):
        (folder / f"{name}.jpg").write_bytes((photos / f"{name}.jpg").read_bytes())
    (folder / "broken.jpg").write_bytes((photos / "rocket.jpg").read_bytes()[:5000])
    return folder


def test_a_corrupt_photograph_is_named_and_stops_the_export(call, tmp_path, corrupt):
    out = tmp_path / "out"
    done = call("export", SMALL, *HERE, "--precision", "int8", "--calibration", corrupt, "-o", out)
    assert done.code == 2
    assert "broken.jpg" in done.err
    assert "--skip-corrupt" in done.err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_corrupt_photograph_is_left_out_when_asked(call, tmp_path, corrupt):
    out = tmp_path / "out"
    words = ("export", SMALL, *HERE, "--precision", "int8", "--calibration", corrupt, "-o", out)
    done = call(*words, "--skip-corrupt", "--json")
    assert done.code == 0, done.err
    assert done.err.count("warning: left out of calibration") == 1
    assert "broken.jpg" in done.err
    assert done.json()["parity"]["images"] == 2


USAGE = {
    "unknown backbone": (("resnet19", *HERE), "Did you mean 'resnet18'"),
    "unknown runtime": ((SMALL, "--runtime", "onnxrt"), "Did you mean 'onnxruntime'"),
    "torch has no engine": ((SMALL, "--runtime", "torch"), "no engine to export"),
    "unknown precision": ((SMALL, *HERE, "--precision", "int9"), "Did you mean 'int8'"),
    "precision not of the runtime": ((SMALL, *HERE, "--precision", "bf16"), "it has fp32, fp16, int8"),
    "int8 without images": ((SMALL, *HERE, "--precision", "int8"), "--calibration FOLDER"),
    "setting not of the precision": ((SMALL, *HERE, "--calibrator", "mse"), "has no setting 'calibrator'"),
    "unknown calibrator": ((SMALL, *HERE, "--precision", "int8", "--calibrator", "mes"), "Did you mean 'mse'"),
    "agreement above 1": ((SMALL, *HERE, "--min-top1-agreement", "90"), "from 0 to 1"),
    "absent level": ((SMALL, *HERE, "--features-only", "--output-indices", "2,9"), "It has 0 (stem, stride 2)"),
    "indices that are no numbers": ((SMALL, *HERE, "--output-indices", "a,b"), "--output-indices is 'a,b'"),
    "impossible stride": (("efficientnet_b0", *HERE, "--output-stride", "7"), "it must be 8, 16 or 32"),
    "image size": ((SMALL, "--runtime", "onnxruntime", "--image-size", "1x2x3"), "256x320"),
    "batch of one comma": ((SMALL, *HERE, "--batch-size", "1,2"), "MIN,OPT,MAX"),
    "batch out of order": ((SMALL, *HERE, "--batch-size", "4,2,1"), "1 <= min <= opt <= max"),
    "checkpoint without its name": (("mine.pth", *HERE), "Add --backbone NAME"),
    "backbone without a checkpoint": ((SMALL, *HERE, "--backbone", SMALL), "Leave out --backbone"),
    "two weights": (("resnet18", *HERE, "--pretrained", "--weights", "a1_in1k"), "both given"),
    "no such path": (("somewhere/else", *HERE), "Check the path"),
}


@pytest.mark.parametrize("case", USAGE)
def test_bad_usage_gives_2_and_leaves_nothing(call, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    words, message = USAGE[case]
    done = call("export", *words)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: ")
    assert message in done.err
    assert "Traceback" not in done.err
    assert not list(tmp_path.iterdir())


def test_a_calibration_folder_without_images_is_refused(call, tmp_path):
    (tmp_path / "empty").mkdir()
    words = ("export", SMALL, *HERE, "--precision", "int8", "-o", tmp_path / "out", "--calibration")
    empty, absent = call(*words, tmp_path / "empty"), call(*words, tmp_path / "absent")
    assert (empty.code, absent.code) == (2, 2)
    assert "no image files in the folder" in empty.err
    assert "no such file or folder" in absent.err
    assert [entry.name for entry in tmp_path.iterdir()] == ["empty"]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 64, 64, 3), np.float32), "(2, 64, 64, 3)"),
        (np.zeros((2, 3, 64, 64), np.uint8), "uint8"),
        (np.full((2, 3, 64, 64), np.nan, np.float32), "NaN"),
    ],
    ids=["layout", "dtype", "NaN"],
)
def test_calibration_arrays_must_be_what_the_model_takes(call, tmp_path, array, message):
    np.save(tmp_path / "images.npy", array)
    words = ("--precision", "int8", "--calibration", tmp_path / "images.npy", "-o", tmp_path / "out")
    done = call("export", SMALL, *HERE, *words)
    assert done.code == 2
    assert message in done.err
    assert [entry.name for entry in tmp_path.iterdir()] == ["images.npy"]


def test_weights_that_do_not_fit_are_refused(call, tmp_path):
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "wrong.pth")
    done = call("export", SMALL, *HERE, "--weights", tmp_path / "wrong.pth", "-o", tmp_path / "out")
    assert done.code == 6
    assert "missing" in done.err
    assert "conv1.weight" in done.err
    assert [entry.name for entry in tmp_path.iterdir()] == ["wrong.pth"]


def test_a_taken_folder_stays_as_it_is(call, tmp_path, classifier):
    (tmp_path / "notes.txt").write_text("mine")
    other = call("export", SMALL, *HERE, "-o", tmp_path)
    bundle = call("export", SMALL, *HERE, "-o", classifier)
    assert (other.code, bundle.code) == (2, 2)
    assert "is not a bundle, so it will not be replaced" in other.err
    assert "--overwrite" in bundle.err
    assert "[1/9]" not in other.err + bundle.err, "refused only after work had begun"
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_missing_runtime_package_gives_the_pip_command(call, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    done = call("export", SMALL, "--runtime", "openvino", "-o", tmp_path / "out")
    assert done.code == 4
    assert "pip install openvino" in done.err
    assert "[1/9]" not in done.err, "refused only after work had begun"
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_numbers_outside_the_budget_name_each_level_and_leave_nothing(call, tmp_path, photos):
    words = ("--precision", "int8", "--calibration", photos, "--min-sqnr-db", "90", "-o", tmp_path / "out")
    done = call("export", SMALL, *HERE, *words)
    assert (done.code, done.out) == (1, "")
    assert all(f"\n  {level}: " in done.err for level in ("stem", "stage4", "logits"))
    assert "budget at least 90 dB" in done.err
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing(call, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        done = call("export", SMALL, *HERE, "-o", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert done.code == 6
    assert "nothing was left behind" in done.err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow  # tests/cli/test_interruption.py has one signal in the quick tests
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_export_gives_130_and_leaves_nothing(tmp_path, stop):
    words = ["export", "resnet18", *HERE, "-o", str(tmp_path / "out")]
    command = [sys.executable, "-m", "deploykit", *words]
    # A test that was started in the background has SIGINT ignored, and its children would too.
    listen = functools.partial(signal.signal, stop, signal.SIG_DFL)
    with subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        preexec_fn=listen,  # noqa: PLW1509
    ) as process:
        for line in process.stderr:
            if "trace the module" in line:
                process.send_signal(stop)
                break
        rest = process.stderr.read()
    assert process.returncode == 130
    assert "error: interrupted" in rest
    assert not list(tmp_path.iterdir())


def test_an_engine_that_cannot_run_here_is_said_to_be_built_only(call, tmp_path, photos):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    from deploykit.backends.tensorrt.cuda_driver import cuda_capabilities

    if cuda_capabilities():
        pytest.skip("there is a CUDA device here, so the plan runs")
    out = tmp_path / "out"
    made = call("export", SMALL, "--runtime", "tensorrt", "--image-size", "64", "-o", out)
    assert made.code == 0, made.err
    assert "built and never executed" in made.out
    verified = call("verify", out, "--json")
    assert verified.code == 5
    assert json.loads(verified.out)["error"] == "DeviceUnavailable"
    assert "was built and never executed" in verified.err
    assert call("run", out, photos).code == 5
    shown = call("inspect", out)
    assert shown.code == 0
    assert "built, never executed" in shown.out
    assert "compute_capability sm" in shown.out
