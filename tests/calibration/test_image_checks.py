from __future__ import annotations

import numpy as np
import pytest

from deploykit.calibration.image_checks import ENOUGH_IMAGES, ImageChecks
from deploykit.spec import Preprocessing

GENERATOR = np.random.default_rng(0)
IMAGENET = Preprocessing()


def pixels(count: int) -> np.ndarray:
    return GENERATOR.uniform(0, 255, size=(count, 3, 8, 8)).astype(np.float32)


def normalised(images: np.ndarray, preprocessing: Preprocessing = IMAGENET) -> np.ndarray:
    mean, std = (np.reshape(values, (3, 1, 1)) for values in (preprocessing.mean, preprocessing.std))
    return ((images / 255 - mean) / std).astype(np.float32)


def problems(images: np.ndarray, preprocessing: Preprocessing = IMAGENET) -> str:
    checks = ImageChecks(preprocessing)
    for start in range(0, len(images), 4):
        checks.update(images[start : start + 4])
    return "\n".join(checks.problems())


@pytest.mark.parametrize(
    "preprocessing",
    [IMAGENET, Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3), Preprocessing(mean=(0.0,) * 3, std=(1.0,) * 3)],
)
def test_enough_normalised_photographs_are_in_order(preprocessing):
    assert problems(normalised(pixels(ENOUGH_IMAGES), preprocessing), preprocessing) == ""


def test_few_images_are_told_with_their_number_and_what_is_enough():
    found = problems(normalised(pixels(ENOUGH_IMAGES - 1)))
    assert "only 15 different calibration images" in found
    assert "expected at least 16" in found
    assert "give more photographs" in found


def test_images_that_repeat_count_once():
    assert "only 3 different calibration images" in problems(np.tile(normalised(pixels(3)), (9, 1, 1, 1)))
    assert "all 20 calibration images are identical" in problems(np.tile(normalised(pixels(1)), (20, 1, 1, 1)))


def test_blank_images_are_counted():
    images = normalised(pixels(20))
    images[3:5] = images[3:5, :, :1, :1]
    assert problems(images).startswith("2 of 20 calibration images are constant")


@pytest.mark.parametrize(
    ("images", "cause"),
    [
        (pixels(16), "divided by 255"),
        (pixels(16) / 255, "mean and std left out"),
        (normalised(pixels(16)) * 255, "divided by 255"),
    ],
    ids=["pixels", "scaled pixels", "pixels times std"],
)
def test_images_that_are_not_normalised_are_told_with_both_ranges(images, cause):
    found = problems(images)
    assert "do not look normalised" in found
    assert "-2.1 to 2.6" in found
    assert cause in found
    assert "input_spec.preprocessing" in found


def test_noise_of_unit_variance_passes_for_normalised():
    assert problems(GENERATOR.normal(size=(16, 3, 8, 8)).astype(np.float32)) == ""


def test_no_images_have_no_problems():
    assert ImageChecks(IMAGENET).problems() == ()
