"""Engines that embed the preprocessing, from the export to the photograph."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import deploykit
from deploykit import create_backbone, export_backbone, load_bundle, load_images, verify_bundle
from deploykit.bundle import open_bundle
from deploykit.errors import SpecError
from deploykit.export.measure import parity_images
from deploykit.images.preprocess import normalize
from deploykit.parity.metrics import sqnr_db
from deploykit.parity.report import ParityReport
from tests.backbones.realistic import randomize
from tests.small_resnet import SMALL


def backbone_of(name: str = SMALL, size: int = 64, **options: object):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomize(create_backbone(name, image_size=size, features_only=True, **options)).eval()


@pytest.fixture(scope="module")
def backbone():
    return backbone_of(output_indices=(0, 2, 4))


@pytest.mark.parametrize("runtime", ["onnxruntime", pytest.param("openvino", marks=pytest.mark.slow)])
def test_a_photograph_gives_the_features_of_torch_on_the_normalised_one(backbone, runtime, photographs, tmp_path):
    export_backbone(backbone, tmp_path / "bundle", runtime=runtime, batch_size=(1, 1, 4), embed_preprocessing=True)
    manifest = open_bundle(tmp_path / "bundle")
    assert manifest.input.shape == ("batch", 64, 64, 3)
    assert manifest.status == "parity_checked"
    assert verify_bundle(tmp_path / "bundle").passed
    files = sorted(photographs.iterdir())[:3]
    expected = backbone(load_images(files, backbone.input_spec))
    with load_bundle(tmp_path / "bundle") as model:
        found = model(load_images(files, model.input_spec))
    assert min(sqnr_db(expected[name], found[name]) for name in expected) >= 100


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_lower_precisions_keep_the_same_input(backbone, precision, photographs, tmp_path):
    export_backbone(
        backbone,
        tmp_path / "bundle",
        runtime="onnxruntime",
        precision=precision,
        calibration=photographs,
        embed_preprocessing=True,
    )
    report = ParityReport.load(tmp_path / "bundle" / "parity.json")
    assert report.passed
    assert len(report.levels) == 3
    assert verify_bundle(tmp_path / "bundle").passed


@pytest.mark.slow
def test_int8_is_calibrated_on_pixels_as_on_the_photographs_they_come_from(backbone, photographs, tmp_path):
    files = sorted(photographs.iterdir())
    sources = {"files": files, "pixels": load_images(files, backbone.input_spec.as_pixels())}
    for name, source in sources.items():
        export_backbone(
            backbone,
            tmp_path / name,
            runtime="onnxruntime",
            precision="int8",
            calibration=source,
            embed_preprocessing=True,
        )
    one, other = ((tmp_path / name / "model.onnx").read_bytes() for name in sources)
    assert one == other


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["torch_compile", "onnxruntime", "openvino"])
@pytest.mark.parametrize(
    "name", ["resnet50", "tf_efficientnet_b0", "mobilenetv3_large_100", "vit_tiny_patch16_224", "convnext_atto"]
)
def test_every_family_gives_torchs_features_to_60_db(name, runtime):
    model = backbone_of(name, 224)
    given = parity_images(None, model.input_spec.as_pixels())[:2]
    expected = model(normalize(given, model.input_spec.preprocessing))
    with create_backbone(model, runtime=runtime, embed_preprocessing=True, cache=False) as engine:
        for position in range(2):
            found = engine(given[position : position + 1])
            for level, feature in found.items():
                assert sqnr_db(expected[level][position : position + 1], feature) >= 60


@pytest.mark.slow
def test_the_engine_cache_keeps_both_forms_apart(backbone):
    with create_backbone(backbone, runtime="onnxruntime", embed_preprocessing=True) as of_pixels:
        assert of_pixels.input_spec.embeds_preprocessing
    with create_backbone(backbone, runtime="onnxruntime") as of_floats:
        assert not of_floats.input_spec.embeds_preprocessing


def test_a_float_bundle_is_not_opened_as_a_pixel_engine(backbone, tmp_path):
    export_backbone(backbone, tmp_path / "floats", runtime="onnxruntime")
    with pytest.raises(SpecError, match="embed_preprocessing=True, and the bundle has False"):
        create_backbone(tmp_path / "floats", embed_preprocessing=True)


def test_a_model_that_embeds_its_preprocessing_is_not_wrapped_again(tmp_path):
    model = create_backbone(SMALL, image_size=64, embed_preprocessing=True)
    with pytest.raises(SpecError, match=r"Give model\.backbone"):
        deploykit.export_backbone(model, tmp_path / "bundle", runtime="onnxruntime")


def test_a_model_of_five_channels_takes_pixels_of_five(tmp_path):
    model = backbone_of(in_channels=5, output_indices=(1,))
    given = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 5), np.uint8)
    with create_backbone(model, runtime="onnxruntime", embed_preprocessing=True, cache=False) as engine:
        found = engine(given)["stage1"]
    assert sqnr_db(model(normalize(given, model.input_spec.preprocessing))["stage1"], found) >= 100
