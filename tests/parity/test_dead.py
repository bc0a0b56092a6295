"""Outputs that were not computed from the images."""

from __future__ import annotations

import numpy as np
import pytest

from deploykit.parity.dead import dead_outputs

REFERENCE = np.random.default_rng(0).standard_normal((4, 8, 3, 3)).astype(np.float32)


def _with(position, value):
    changed = REFERENCE.copy()
    changed[position] = value
    return changed


@pytest.mark.parametrize(
    ("candidate", "fault"),
    [
        (_with((0, 0, 0, 0), np.nan), "1 of 288 values are NaN or infinite"),
        (_with((1, 2, 0, 0), -np.inf), "1 of 288 values are NaN or infinite"),
        (np.zeros_like(REFERENCE), "every value is 0"),
        (np.full_like(REFERENCE, 0.25), "every value is 0.25"),
        (_with(2, REFERENCE[1]), "images 1 and 2 get the same answer"),
        (np.repeat(REFERENCE[:1], 4, axis=0), "images 0 and 1 get the same answer"),
    ],
)
def test_what_an_output_cannot_be_is_said(candidate, fault):
    assert fault in dead_outputs({"stage1": REFERENCE}, {"stage1": candidate})["stage1"]


def test_an_output_that_is_only_wrong_is_not_dead():
    assert not dead_outputs({"stage1": REFERENCE}, {"stage1": -3 * REFERENCE})


def test_what_the_reference_does_too_is_no_fault():
    same = np.repeat(REFERENCE[:1], 4, axis=0)
    assert not dead_outputs({"a": same, "b": np.zeros((2, 9))}, {"a": same * 2, "b": np.zeros((2, 9))})
