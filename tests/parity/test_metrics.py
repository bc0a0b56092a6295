from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from deploykit.errors import SpecError
from deploykit.parity.metrics import ErrorSums, cosine, max_abs, relative_l2, sqnr_db, top1_agreement

VALUES = st.floats(-1e6, 1e6, width=32)
SHAPES = hnp.array_shapes(min_dims=1, max_dims=4, max_side=6)


@st.composite
def pairs(draw, count=2):
    shape = draw(SHAPES)
    return [draw(hnp.arrays(np.float32, shape, elements=VALUES)) for _ in range(count)]


def noisy(reference: np.ndarray, db: float) -> np.ndarray:
    """The reference plus noise of exactly this many dB below it."""
    noise = np.random.default_rng(1).standard_normal(reference.shape)
    scale = np.linalg.norm(reference) / np.linalg.norm(noise) / 10 ** (db / 20)
    return reference + noise * scale


@pytest.mark.parametrize("db", [-10.0, 0.0, 12.0, 80.0, 200.0])
def test_sqnr_and_relative_l2_of_a_known_noise(db):
    reference = np.random.default_rng(0).standard_normal((2, 3, 50, 50)) * 1000
    assert sqnr_db(reference, noisy(reference, db)) == pytest.approx(db, abs=0.01)
    assert relative_l2(reference, noisy(reference, db)) == pytest.approx(10 ** (-db / 20), rel=0.01)


def test_small_examples_by_hand():
    reference, candidate = np.array([3.0, 4.0]), np.array([3.0, 3.0])
    assert sqnr_db(reference, candidate) == pytest.approx(10 * math.log10(25))
    assert relative_l2(reference, candidate) == pytest.approx(0.2)
    assert cosine(reference, candidate) == pytest.approx(21 / (5 * math.sqrt(18)))
    assert max_abs(reference, candidate) == 1
    assert cosine(reference, -reference) == -1


def test_equal_arrays_match_perfectly_and_zeros_too():
    for array in (np.array([1.5, -2]), np.zeros((2, 3))):
        assert sqnr_db(array, array) == math.inf
        assert relative_l2(array, array) == 0
        assert cosine(array, array) == pytest.approx(1)
        assert max_abs(array, array) == 0


def test_a_reference_of_zeros_and_a_candidate_of_zeros():
    zeros, ones = np.zeros(3), np.ones(3)
    assert (sqnr_db(zeros, ones), relative_l2(zeros, ones), cosine(zeros, ones)) == (-math.inf, math.inf, 0)
    assert (sqnr_db(ones, zeros), relative_l2(ones, zeros), cosine(ones, zeros)) == (0, 1, 0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_candidate_that_is_not_finite_is_the_worst_and_a_reference_an_error(bad):
    reference, candidate = np.ones((1, 4), np.float32), np.array([[1, bad, 1, 1]], np.float32)
    assert sqnr_db(reference, candidate) == -math.inf
    assert relative_l2(reference, candidate) == max_abs(reference, candidate) == math.inf
    assert cosine(reference, candidate) == 0
    assert top1_agreement(reference, candidate) == 0
    for metric in (sqnr_db, relative_l2, max_abs, cosine, top1_agreement):
        with pytest.raises(SpecError, match="reference holds NaN"):
            metric(candidate, reference)


@pytest.mark.parametrize("metric", [sqnr_db, relative_l2, max_abs, cosine, top1_agreement])
def test_shapes_that_differ_and_empty_arrays_are_errors(metric):
    with pytest.raises(SpecError, match=r"\(1, 3\).*\(3, 1\)"):
        metric(np.ones((3, 1)), np.ones((1, 3)))
    with pytest.raises(SpecError, match="no values"):
        metric(np.ones((0, 3)), np.ones((0, 3)))


def test_half_precision_and_integers_are_compared_in_float64():
    reference = np.full((4,), 60000, np.float16)
    assert sqnr_db(reference, -reference) == pytest.approx(-20 * math.log10(2))
    assert max_abs(np.array([0], np.uint8), np.array([255], np.uint8)) == 255
    assert max_abs(np.array([255], np.uint8), np.array([0], np.uint8)) == 255


def test_top1_counts_images_whose_class_stays():
    reference = np.array([[0, 9, 1], [5, 1, 1], [1, 2, 3], [7, 7, 0]], np.float32)
    candidate = np.array([[0, 1, 0], [0, 1, 0], [math.nan, 2, 3], [7, 6, 0]], np.float32)
    assert top1_agreement(reference, candidate) == 0.5
    with pytest.raises(SpecError, match=r"expected \(N, classes\)"):
        top1_agreement(np.ones((1, 2, 3)), np.ones((1, 2, 3)))


def test_arrays_of_several_pieces_and_strides_are_seen_whole():
    reference = np.random.default_rng(0).standard_normal((700, 900)).astype(np.float32)
    candidate = reference.copy()
    candidate[-1, -1] += 3
    assert max_abs(reference, candidate) == pytest.approx(3, abs=1e-6)
    assert sqnr_db(reference.T, candidate.T) == pytest.approx(sqnr_db(reference, candidate), abs=1e-9)
    assert relative_l2(reference, candidate) == pytest.approx(3 / np.linalg.norm(reference), rel=1e-6)


@given(pairs())
@settings(deadline=None)
def test_metrics_agree_with_each_other(arrays):
    reference, candidate = arrays
    db, error = sqnr_db(reference, candidate), relative_l2(reference, candidate)
    if 0 < error < math.inf:
        assert db == pytest.approx(-20 * math.log10(error), abs=1e-6)
    assert (db == math.inf) == np.array_equal(reference, candidate)
    assert -1 <= cosine(reference, candidate) <= 1
    assert (max_abs(reference, candidate) == 0) == np.array_equal(reference, candidate)


@given(pairs(), st.sampled_from([-8.0, 0.25, 2.0, 1024.0]))
@settings(deadline=None)
def test_a_common_scale_changes_only_the_max_abs(arrays, scale):
    reference, candidate = (array.astype(np.float64) for array in arrays)
    assume(np.linalg.norm(reference) > 1e-3)
    assume(np.linalg.norm(reference - candidate) > 1e-3)
    assert sqnr_db(reference * scale, candidate * scale) == pytest.approx(sqnr_db(reference, candidate), abs=1e-6)
    assert cosine(reference * scale, candidate * scale) == pytest.approx(cosine(reference, candidate), abs=1e-9)
    assert max_abs(reference * scale, candidate * scale) == pytest.approx(abs(scale) * max_abs(reference, candidate))


@given(pairs(count=4))
@settings(deadline=None)
def test_the_sums_of_two_batches_are_those_of_both(arrays):
    first, second, third, fourth = arrays
    apart = ErrorSums.of(first, second) + ErrorSums.of(third, fourth)
    whole = ErrorSums.of(np.stack([first, third]), np.stack([second, fourth]))
    assert apart.max_abs == whole.max_abs
    for name in ("reference_power", "candidate_power", "noise_power"):
        assert getattr(apart, name) == pytest.approx(getattr(whole, name), rel=1e-9, abs=1e-300)


@given(hnp.arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 7)), elements=VALUES), st.integers(-8, 8))
@settings(deadline=None)
def test_agreement_is_one_with_itself_at_any_scale(logits, exponent):
    assert top1_agreement(logits, logits.astype(np.float64) * 2.0**exponent) == 1
