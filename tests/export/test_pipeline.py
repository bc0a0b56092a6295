from __future__ import annotations

import getpass
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from deploykit import create_backbone, export_backbone, load_bundle
from deploykit.bundle import open_bundle
from deploykit.calibration.images import calibration_set
from deploykit.calibration.plan import QuantizationPlan
from deploykit.errors import BundleError, CalibrationError, ParityError, SpecError
from deploykit.export.measure import PROXY
from deploykit.parity.report import ParityReport
from deploykit.progress import ImagesCalibrated, StageStarted
from deploykit.spec import BatchRange, Fp32, Int8
from tests.backbones.realistic import randomize
from tests.small_resnet import SMALL

STAGES = ["trace", "fuse", "to_onnx", "plan", "render", "lower", "parity", "bundle"]


def backbone_of(**options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomize(create_backbone(SMALL, **{"image_size": 64, **options})).eval()


@pytest.fixture(scope="module")
def backbone():
    return backbone_of(num_classes=10)


def images_for(model, count: int) -> np.ndarray:
    spec = model.input_spec
    return np.random.default_rng(1).normal(size=(count, spec.channels, spec.height, spec.width)).astype(np.float32)


def stages_of(events) -> list[str]:
    return [event.name for event in events if isinstance(event, StageStarted)]


def decibel(expected: np.ndarray, found: np.ndarray) -> float:
    noise = np.square(expected.astype(np.float64) - found).sum()
    return float(10 * np.log10(np.square(expected.astype(np.float64)).sum() / max(noise, 1e-30)))


# ---- what a bundle holds


@pytest.fixture(scope="module")
def int8_bundles(backbone, photographs, tmp_path_factory) -> tuple[Path, Path]:
    """The same INT8 engine exported twice."""
    folders = tuple(tmp_path_factory.mktemp("int8") / name for name in ("one", "other"))
    for folder in folders:
        export_backbone(backbone, folder, runtime="onnxruntime", precision=Int8(), calibration=photographs)
    return folders


@pytest.mark.slow
def test_equal_exports_give_equal_files(int8_bundles):
    one, other = (open_bundle(folder) for folder in int8_bundles)
    assert one == other


def test_no_file_names_this_machine(int8_bundles):
    secrets = [os.sep + "tmp", tempfile.gettempdir(), str(Path.cwd()), str(Path.home()), sys.prefix, "site-packages"]
    user = getpass.getuser()
    secrets += [user] if len(user) > 5 else []
    for path in int8_bundles[0].iterdir():
        content = path.read_bytes()
        assert not [secret for secret in secrets if len(secret) > 1 and secret.encode() in content], path.name


def test_an_int8_bundle_carries_its_plan_its_report_and_its_reference(int8_bundles, backbone, photographs):
    manifest = open_bundle(int8_bundles[0])
    assert {"parity.json", "reference.npz", "quantization-plan.json", "quantization-plan.npz"} < set(manifest.files)
    assert manifest.status == "parity_checked"
    assert manifest.calibration_digest == calibration_set(photographs, backbone.input_spec).digest
    assert {"fold-batchnorm": 13, "equalize-channels": 9}.items() <= manifest.fusions.items()
    plan = QuantizationPlan.load(int8_bundles[0])
    assert plan.images == 6
    report = ParityReport.load(int8_bundles[0] / "parity.json")
    assert [level.name for level in report.levels] == ["stem", "stage1", "stage2", "stage3", "stage4", "logits"]
    assert min(level.sqnr_db for level in report.levels) > 12


@pytest.mark.parametrize(
    ("runtime", "options", "shapes"),
    [
        (
            "onnxruntime",
            {"features_only": True, "output_indices": (1, 3)},
            {"stage1": (16, 16, 24), "stage3": (32, 4, 6)},
        ),
        pytest.param(
            *("openvino", {"num_classes": 0, "in_channels": 1}, {"embedding": (512,)}), marks=pytest.mark.slow
        ),
    ],
    ids=["features", "embedding"],
)
def test_a_dynamic_batch_gives_torchs_numbers(runtime, options, shapes, tmp_path):
    backbone = backbone_of(image_size=(64, 96), **options)
    result = export_backbone(backbone, tmp_path / "bundle", runtime=runtime, batch_size="dynamic")
    manifest = result.manifest
    assert result.status == manifest.status == "parity_checked"
    assert result.folder == tmp_path / "bundle"
    assert result.parity == ParityReport.load(tmp_path / "bundle" / "parity.json")
    assert (result.speed, result.search, result.recipes) == (None, None, None)
    assert manifest.precision == "fp32"
    assert {output.name: output.shape for output in manifest.outputs} == {
        name: ("batch", *shape) for name, shape in shapes.items()
    }
    with load_bundle(tmp_path / "bundle") as model:
        assert list(model.feature_info) == list(backbone.feature_info)
        for count in (1, 3, 8):
            images = images_for(model, count)
            found, expected = model(images), backbone(images)
            if not isinstance(found, dict):
                (name,) = shapes
                found, expected = {name: found}, {name: expected}
            for name, shape in shapes.items():
                assert found[name].shape == (count, *shape)
                assert decibel(expected[name], found[name]) > 100, (name, count)


@pytest.mark.parametrize("features_only", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_tensorrt_plan_is_built_and_its_graph_checked_in_onnxruntime(features_only, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU: with one the plan itself is checked")
    heard = []
    result = export_backbone(
        backbone_of(features_only=features_only, output_indices=(2, 4)),
        tmp_path / "bundle",
        runtime="tensorrt",
        batch_size=(1, 2, 4),
        target="sm89",
        progress=heard.append,
    )
    manifest = result.manifest
    assert stages_of(heard) == STAGES
    assert manifest.status == "built"
    assert manifest.requires == {"compute_capability": "sm89", "flavour": "tensorrt_rtx", "tf32": "off"}
    assert manifest.input.batch == BatchRange(min=1, opt=2, max=4)
    report = ParityReport.load(tmp_path / "bundle" / "parity.json")
    assert {level.measured_on for level in report.levels} == {PROXY}
    assert len(report.levels) == (2 if features_only else 3)


# ---- what is refused, and what it leaves behind


def test_an_absurd_budget_names_each_failing_level_and_leaves_nothing(backbone, tmp_path):
    with pytest.raises(ParityError) as caught:
        export_backbone(
            backbone, tmp_path / "bundle", runtime="onnxruntime", precision=Fp32(min_sqnr_db=200), output_indices=None
        )
    message = str(caught.value)
    for level in ("stem", "stage1", "stage2", "stage3", "stage4", "logits"):
        assert level in message
    assert "6 of 6 levels" in message
    assert not list(tmp_path.iterdir())


def test_int8_without_images_is_refused_before_any_work(backbone, tmp_path):
    heard = []
    with pytest.raises(CalibrationError, match="Random data is never used"):
        export_backbone(
            backbone,
            tmp_path / "bundle",
            runtime="onnxruntime",
            precision="int8",
            progress=heard.append,
        )
    assert not heard
    assert not list(tmp_path.iterdir())


def test_a_precision_that_the_runtime_lacks_is_refused_with_those_it_has(backbone, tmp_path):
    with pytest.raises(SpecError, match=r"onnxruntime runtime has no bf16; it has fp32"):
        export_backbone(backbone, tmp_path / "bundle", runtime="onnxruntime", precision="bf16")


EXPORT = """
import sys
from deploykit import export_backbone
from deploykit.progress import StageStarted
for runtime in sys.argv[2:]:
    export_backbone(
        "resnet18", sys.argv[1], runtime=runtime, image_size=64, batch_size=1,
        progress=lambda event: isinstance(event, StageStarted) and print(event.name, flush=True),
    )
"""


def exporting(code: str, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_killed_export_leaves_nothing_that_loads(tmp_path):
    folder = tmp_path / "bundle"
    process = exporting(EXPORT, str(folder), "onnxruntime")
    for line in process.stdout:
        if line.strip() == "parity":  # the engine is written and the manifest is not
            process.send_signal(signal.SIGKILL)
            break
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    left = list(tmp_path.iterdir())
    assert [path.suffix for path in left] == [".partial"]
    for path in (folder, *left):
        with pytest.raises(BundleError):
            load_bundle(path)


FULL_DISK = """
import resource
from deploykit.errors import BundleError
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
try:
    exec(EXPORT)
except BundleError as error:
    print("BundleError:", error)
"""


@pytest.mark.slow
def test_a_full_disk_is_a_bundle_error_that_leaves_nothing(tmp_path):
    pytest.importorskip("resource", reason="needs RLIMIT_FSIZE")
    process = exporting(f"EXPORT = {EXPORT!r}\n{FULL_DISK}", str(tmp_path / "bundle"), "onnxruntime")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "BundleError:" in out
    assert "Fix: Free some space or raise the limit" in out
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_second_runtime_does_not_calibrate_again(backbone, photographs, tmp_path, monkeypatch):
    monkeypatch.setenv("DEPLOYKIT_CACHE", str(tmp_path / "cache"))
    heard = {"onnxruntime": [], "openvino": []}
    for runtime, events in heard.items():
        export_backbone(
            *(backbone, tmp_path / runtime),
            runtime=runtime,
            precision="int8",
            calibration=photographs,
            progress=events.append,
        )
    seen = {
        runtime: [(event.done, event.total) for event in events if isinstance(event, ImagesCalibrated)]
        for runtime, events in heard.items()
    }
    assert seen == {"onnxruntime": [(count, 6) for count in range(1, 7)], "openvino": []}
    one, other = (QuantizationPlan.load(tmp_path / runtime) for runtime in heard)
    assert one.ranges == other.ranges
    assert one.key == other.key
