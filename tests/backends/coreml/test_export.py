"""A whole export on a machine that cannot run it: built, its numbers those of the program in torch."""

from __future__ import annotations

import platform

import pytest
from typer.testing import CliRunner

import deploykit
from deploykit.backends.coreml.inspect import left_in_float
from deploykit.cli.main import app
from deploykit.errors import DeviceUnavailable
from deploykit.export.measure import PROXY
from tests.small_resnet import SMALL

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(platform.system() == "Darwin", reason="this is macOS, which runs Core ML"),
]


@pytest.mark.parametrize(
    ("precision", "least_db"),
    [("fp32", 90), ("fp16", 45), (deploykit.Int8(), 12), (deploykit.Int8(float_dtype="fp16"), 12)],
    ids=["fp32", "fp16", "int8", "int8-fp16"],
)
def test_an_export_is_built_and_says_so(precision, least_db, photographs, tmp_path):
    bundle = tmp_path / "bundle"
    result = deploykit.export_backbone(
        SMALL,
        bundle,
        runtime="coreml",
        precision=precision,
        calibration=photographs if isinstance(precision, deploykit.Int8) else None,
        features_only=True,
        image_size=64,
    )
    assert result.status == "built"
    assert {level.measured_on for level in result.parity.levels} == {PROXY}
    assert len(result.parity.levels) == 5
    assert all(level.sqnr_db > least_db for level in result.parity.levels)
    with pytest.raises(DeviceUnavailable, match="coreml runs on macOS"):
        deploykit.load_bundle(bundle)
    verified = CliRunner().invoke(app, ["verify", str(bundle)])
    assert verified.exit_code == 5
    assert "was built and never executed" in " ".join(verified.output.split())


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_pixels_are_integers_in_the_package(precision, photographs, tmp_path):
    result = deploykit.export_backbone(
        SMALL,
        tmp_path / "bundle",
        runtime="coreml",
        precision=precision,
        calibration=photographs if precision == "int8" else None,
        embed_preprocessing=True,
        features_only=True,
        image_size=64,
    )
    assert result.status == "built"
    assert result.manifest.input.dtype == "uint8"
    from deploykit.backends.coreml.mil_program import INT32, read_program

    (pixels,) = read_program(tmp_path / "bundle" / "model.mlpackage").inputs
    assert (pixels.shape, pixels.dtype) == ((1, 64, 64, 3), INT32)


@pytest.mark.parametrize("precision", ["fp16", "int8"])
@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "coatnet_0_rw_224", "mobilevit_s"])
def test_networks_of_windows_and_of_convolutions_with_attention_are_built(name, precision, photographs, tmp_path):
    calibration = photographs if precision == "int8" else None
    bundle = tmp_path / "bundle"
    result = deploykit.export_backbone(
        name, bundle, runtime="coreml", precision=precision, calibration=calibration, image_size=64
    )
    assert result.status == "built"
    least_db = 45 if precision == "fp16" else 12
    assert all(level.sqnr_db > least_db for level in result.parity.levels)
    if precision == "int8":
        assert set(left_in_float(bundle / result.manifest.engine)) == {"quantize", "dequantize"}
