"""``--embed-preprocessing``, from the export to a photograph's classes."""

from __future__ import annotations

import numpy as np
import pytest

import deploykit
from deploykit.bundle import read_manifest
from tests.small_resnet import SMALL


@pytest.fixture(scope="module")
def bundle(call, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles") / "pixels"
    words = ("--runtime", "onnxruntime", "--image-size", "64x96", "--embed-preprocessing", "-o", folder)
    done = call("export", SMALL, *words)
    assert done.code == 0, done.err
    return folder


def test_the_bundle_takes_pixels_and_verifies(call, bundle):
    spec = read_manifest(bundle).input
    assert (spec.dtype, spec.layout, spec.shape) == ("uint8", "NHWC", (1, 64, 96, 3))
    assert call("verify", bundle).code == 0


def test_its_page_says_where_the_preprocessing_is(call, bundle):
    page = call("inspect", bundle).out
    assert "1 x 64 x 96 x 3 uint8 NHWC" in page
    assert "(of RGB in 0 to 1), inside the engine" in page


@pytest.mark.parametrize("crop_mode", ["center", "squash"])
def test_photographs_run_through_it(call, bundle, photos, crop_mode):
    file = photos / "coffee.jpg"
    best = call("run", bundle, file, "--crop-mode", crop_mode, "--json").json()["images"][0]["top"]
    if crop_mode == "center":
        with deploykit.load_bundle(bundle) as model:
            logits = model(deploykit.load_images(file, model.input_spec))[0]
        assert [each["index"] for each in best] == list(np.argsort(-logits)[:5])
    assert len(best) == 5


def test_a_dry_run_shows_the_input(call, tmp_path):
    words = ("export", SMALL, "--runtime", "openvino", "--embed-preprocessing", "--batch-size", "2")
    done = call(*words, "-o", tmp_path / "out", "--dry-run")
    assert done.code == 0, done.err
    assert "2 x 224 x 224 x 3 uint8 NHWC" in done.out
