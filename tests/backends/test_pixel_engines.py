"""What every runtime that runs here promises of an engine that embeds its preprocessing."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from deploykit.backends.runtime import Runtime, run_in_batches
from deploykit.backends.table import load_backend
from deploykit.bundle import Manifest
from deploykit.errors import SpecError
from deploykit.fusion.embed_preprocessing import embed_preprocessing
from deploykit.images.preprocess import normalize
from tests.conftest_graphs import (
    RAN_HERE,
    SIDE,
    SLOW_TO_BUILD,
    lower,
    manifest_of,
    open_engine,
    reference,
    sqnr_db,
    tiny_master,
)

every_runtime = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW_TO_BUILD else name for name in RAN_HERE]
)


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="deploykit-tests-")


@functools.cache
def pixel_engine(runtime: str) -> tuple[Manifest, Path]:
    float_graph = tiny_master().form(load_backend(runtime).source)
    graph = embed_preprocessing(float_graph, float_graph.input.as_pixels())
    folder = Path(_scratch().name) / runtime
    folder.mkdir()
    return manifest_of(runtime, graph, lower(runtime, graph, folder)), folder


@pytest.fixture
def model(name: str):
    with open_engine(*pixel_engine(name)) as opened:
        yield opened


def pixels(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, SIDE, SIDE, 3), np.uint8)


@every_runtime
@pytest.mark.parametrize("count", [1, 3, 8])
def test_pixels_give_the_features_of_normalised_images(model: Runtime, count: int):
    given = pixels(count)
    features = model(given)
    expected = reference(normalize(given, model.input_spec.preprocessing))
    for want, found in zip(expected, features.values(), strict=True):
        assert sqnr_db(want, found) >= 100
    for key, value in model(torch.from_numpy(given)).items():
        np.testing.assert_array_equal(value.numpy(), features[key])


@every_runtime
def test_read_only_and_strided_pixels_are_taken_and_any_number_in_batches(model: Runtime):
    given = pixels(10)
    expected = {key: value[:2] for key, value in run_in_batches(model, given).items()}
    given.flags.writeable = False
    strided = np.ascontiguousarray(given.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)
    for view in (given[:2], strided[:2]):
        for key, value in model(view).items():
            np.testing.assert_allclose(value, expected[key], rtol=1e-4, atol=1e-4)


BAD_PIXELS = {
    "normalised floats": (np.zeros((1, 3, 32, 32), np.float32), r"float32; expected .* uint8 NHWC.*without mean and"),
    "float pixels": (np.zeros((1, 32, 32, 3)), r"float64.*0 to 255.*load_images"),
    "int64": (np.zeros((1, 32, 32, 3), np.int64), r"int64.*\.astype\(np\.uint8\)"),
    "NCHW": (np.zeros((1, 3, 32, 32), np.uint8), r"look like NCHW: use images\.transpose\(0, 2, 3, 1\)"),
    "unbatched": (pixels(1)[0], r"Add the batch dimension"),
    "other size": (np.zeros((1, 16, 32, 3), np.uint8), r"\(1, 16, 32, 3\).*\('batch', 32, 32, 3\) uint8 NHWC"),
    "too many": (pixels(9), "9 images and the model takes 1..8"),
    "a float tensor": (torch.zeros(1, 3, 32, 32), r"torch\.float32; expected .*torch\.uint8.*without mean and std"),
    "a list": ([[0]], "list"),
}


@every_runtime
@pytest.mark.parametrize("fault", BAD_PIXELS)
def test_bad_pixels_are_named(model: Runtime, fault: str):
    images, message = BAD_PIXELS[fault]
    with pytest.raises(SpecError, match=message):
        model(images)
