from __future__ import annotations

import numpy as np
import pytest

from deploykit.calibration.ranges import quantize_weight
from deploykit.calibration.rounded_weight import RoundedWeight

WEIGHT = np.random.default_rng(0).normal(size=(6, 4, 3, 3)).astype(np.float32)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("far", [0, 1, 40, 200])
def test_any_integers_come_back(axis, far):
    nearest, scales = quantize_weight(WEIGHT, axis)
    moves = np.random.default_rng(1).integers(-far, far + 1, WEIGHT.shape)
    integers = np.clip(nearest.astype(int) + moves, -127, 127).astype(np.int8)
    kept = RoundedWeight.of(WEIGHT, axis, integers, scales)
    assert (kept.steps.dtype, kept.steps.any()) == (np.int8, far > 0)
    found, found_scales = kept.integers_of(WEIGHT, axis)
    np.testing.assert_array_equal(found, integers)
    np.testing.assert_array_equal(found_scales, scales)


def test_a_channel_that_needs_a_larger_scale_is_rounded_to_the_nearest_at_it():
    nearest, scales = quantize_weight(WEIGHT, 0)
    kept = RoundedWeight.of(WEIGHT, 0, nearest + (nearest < 0).astype(np.int8), scales)
    least = np.where(np.arange(6) == 2, 3 * scales, 0).astype(np.float32)
    found, found_scales = kept.integers_of(WEIGHT, 0, least)
    coarse, raised = quantize_weight(WEIGHT, 0, least)
    np.testing.assert_array_equal(found[2], coarse[2])
    assert found_scales[2] == raised[2] == np.float32(least[2])
    others = np.arange(6) != 2
    np.testing.assert_array_equal(found[others], kept.integers_of(WEIGHT, 0)[0][others])
