"""A whole export for a phone: built, its numbers the simulator's, and nothing of it opens as if this were the phone."""

from __future__ import annotations

import dataclasses

import pytest
from typer.testing import CliRunner

import deploykit
from deploykit.backends.onnxruntime.qnn.package import SIMULATOR
from deploykit.bundle import open_bundle
from deploykit.cli.main import app
from deploykit.errors import DeviceUnavailable, SpecError
from deploykit.parity.report import ParityReport
from tests.backends.onnxruntime.qnn.conftest import on_x86
from tests.small_resnet import SMALL

pytest.importorskip("onnxruntime_qnn", reason="onnxruntime-qnn is not installed")

NETWORK = {"features_only": True, "image_size": 32, "output_indices": (3, 4)}


@pytest.fixture(scope="module")
def bundle(photographs, tmp_path_factory):
    """The command, with what it prints: it asks for more than the function does by itself."""
    folder = tmp_path_factory.mktemp("qnn-export") / "bundle"
    network = ["--features-only", "--image-size", "32", "--output-indices", "3,4"]
    asked = ["export", SMALL, "--target", "sm8650", "--calibration", str(photographs), *network, "-o", str(folder)]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    return folder, " ".join(done.output.split())


@on_x86
def test_the_report_says_that_it_was_the_simulator(bundle):
    folder, printed = bundle
    manifest, parity = open_bundle(folder), ParityReport.load(folder / "parity.json")
    assert (manifest.status, manifest.runtime, manifest.target) == (
        "built",
        "onnxruntime",
        "qualcomm-snapdragon-8-gen-3",
    )
    assert manifest.made_for.device == "qnn"
    assert "device" not in manifest.seen_on
    (where,) = {level.measured_on for level in parity.levels}
    assert where == f"engine, in {manifest.seen_on['simulator']}"
    assert parity.passed
    assert f"compared here in {manifest.seen_on['simulator']}, never on the device" in printed
    assert manifest.speedup is None
    assert manifest.precision_settings["float_dtype"] == "fp16"


@on_x86
def test_a_bundle_is_verified_in_the_simulator_and_nothing_is_recorded(bundle):
    folder, _ = bundle
    with pytest.raises(DeviceUnavailable, match="this engine is for Qualcomm Snapdragon 8 Gen 3, NPU"):
        deploykit.load_bundle(folder)
    verified = CliRunner().invoke(app, ["verify", str(folder), "--device", SIMULATOR])
    assert verified.exit_code == 0, verified.output
    assert "engine, in the simulator of QNN" in verified.output
    assert "A simulator ran it. Copy it to its device" in verified.output
    assert deploykit.verify_bundle(folder, device=SIMULATOR).is_simulated
    with pytest.raises(SpecError, match=r"runs here in the simulator of QNN .*, which says nothing of its device"):
        deploykit.verify_bundle(folder, device=SIMULATOR, record=True)
    assert open_bundle(folder).status == "built"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp32"}, "has fp32: onnxruntime on qnn has fp16, int8"),
        ({"batch_size": "dynamic"}, "engines of onnxruntime on qnn take one batch size"),
        ({"precision": deploykit.Int8(mixed_precision=True)}, "mixed_precision was given, which measures beside fp32"),
        ({"require_speedup": True}, "require_speedup was given"),
    ],
)
def test_what_the_npu_does_not_have_is_refused_before_any_work(options, message, photographs, tmp_path):
    with pytest.raises(SpecError, match=message):
        deploykit.export_backbone(
            SMALL, tmp_path / "bundle", target="sm8650", calibration=photographs, **NETWORK, **options
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ('{ soc_modle = "43" }', r"sets 'soc_modle' of onnxruntime on qnn\. Did you mean 'soc_model'"),
        ('{ soc_model = "43" }', r"the target phone: .*for one SoC, and htp_arch is None"),
        ('{ soc_model = "43", htp_arch = "75" }', r"the target phone: .* SM8550, .* htp_arch 73, and htp_arch is 75\."),
    ],
)
def test_a_target_of_ones_own_names_its_soc(options, message, photographs, tmp_path):
    path = tmp_path / "phone.toml"
    path.write_text(
        'title = "Mine"\nmachine = "aarch64"\nmodel = "SM8550"\nprocessor = "arm64"\nprecision = "int8"\n'
        f'[[runtime]]\nname = "onnxruntime"\ndevice = "qnn"\noptions = {options}\n'
    )
    with pytest.raises(SpecError, match=message):
        deploykit.export_backbone(SMALL, tmp_path / "bundle", target=str(path), calibration=photographs, **NETWORK)


def test_a_runtime_named_without_the_target_is_the_cpus(photographs):
    from deploykit.backends.table import load_backend
    from deploykit.export.target_options import backend_for, export_options

    plain = export_options(None, runtime="onnxruntime")
    phone = export_options("sm8650", runtime="onnxruntime")
    assert backend_for(plain) is load_backend("onnxruntime")
    assert backend_for(phone).title == "onnxruntime on qnn"
    assert dataclasses.asdict(phone.precision)["float_dtype"] == "fp16"
