"""The reader of packages: what the network reads and gives, and damaged files as one typed error."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest

from deploykit.backends.coreml.mil_program import FLOAT32, MODEL, WEIGHTS, Feature, MilProgram, read_program
from deploykit.backends.coreml.package import PACKAGE_FOLDER
from deploykit.errors import BundleError
from tests.calibration.networks import SIDE
from tests.conftest_graphs import engine_of, network


@pytest.fixture(scope="module")
def files(residual_package) -> dict[str, bytes]:
    return {name: (residual_package.path / name).read_bytes() for name in (MODEL, WEIGHTS)}


def test_a_package_has_the_images_and_every_output_by_name(residual_package):
    program = read_program(residual_package.path)
    assert program.inputs == (Feature(name="images", shape=(1, 3, SIDE, SIDE), dtype=FLOAT32),)
    assert program.outputs == (
        Feature(name="stage1", shape=(1, 16, 16, 16), dtype=FLOAT32),
        Feature(name="stage2", shape=(1, 32, 8, 8), dtype=FLOAT32),
        Feature(name="logits", shape=(1, 10), dtype=FLOAT32),
    )


@pytest.mark.slow
def test_float_weights_are_read_to_the_bit():
    program = read_program(engine_of("coreml")[1] / PACKAGE_FOLDER)
    weighted = list(program.weighted())
    assert [operation.kind for operation, _ in weighted] == ["conv", "conv"]
    expected = network(features_only=True).stage1[0].weight.detach().numpy()
    found = np.frombuffer(weighted[1][1].constants["val"], np.float32)
    np.testing.assert_array_equal(found.reshape(expected.shape), expected)


def test_a_folder_without_a_program_is_no_package(files):
    with pytest.raises(BundleError, match=r"model\.mlpackage has no .*model\.mlmodel.*Export the bundle again"):
        MilProgram({WEIGHTS: files[WEIGHTS]}, "model.mlpackage")


@pytest.mark.parametrize("share", [0.02, 0.3, 0.5, 0.8, 0.99])
def test_half_of_a_file_is_not_readable(files, share):
    for name in (MODEL, WEIGHTS):
        cut = files | {name: files[name][: int(len(files[name]) * share)]}
        with pytest.raises(BundleError, match="not a readable ML program"):
            MilProgram(cut, "model.mlpackage")


def test_any_damage_is_a_typed_error_or_another_program(files):
    random = np.random.default_rng(0)
    for _ in range(100):
        damaged = bytearray(files[MODEL])
        for position in random.integers(0, len(damaged), 3):
            damaged[position] = random.integers(0, 256)
        with contextlib.suppress(BundleError):
            MilProgram(files | {MODEL: bytes(damaged)}, "model.mlpackage")
