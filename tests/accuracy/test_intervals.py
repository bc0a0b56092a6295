"""Intervals and tests against values that were worked out by hand or by brute force."""

from __future__ import annotations

from math import comb

import pytest

from deploykit.accuracy.intervals import mcnemar, paired_drop, wilson


def test_wilson_is_the_textbooks():
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


def test_a_wilson_interval_narrows_with_the_images():
    narrow, wide = wilson(9000, 10000), wilson(90, 100)
    assert wide[0] < narrow[0] < 0.9 < narrow[1] < wide[1]


@pytest.mark.parametrize(("lost", "won"), [(10, 2), (2, 10), (1, 0), (30, 29), (0, 9)])
def test_mcnemar_sums_the_binomial_tail(lost, won):
    total = lost + won
    tail = sum(comb(total, k) for k in range(min(lost, won) + 1)) / 2**total
    assert mcnemar(lost, won) == pytest.approx(min(1.0, 2 * tail), rel=1e-9)


def test_mcnemar_of_many_images_neither_overflows_nor_vanishes():
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(5000, 5000) == 1.0
    assert 0 < mcnemar(5200, 4800) < 1e-4


def test_a_drop_is_the_difference_of_the_shares():
    drop, low, high = paired_drop(30, 10, 1000)
    assert drop == pytest.approx(0.02)
    assert 0 < low < drop < high < 0.04


def test_an_interval_of_no_difference_holds_zero():
    drop, low, high = paired_drop(7, 7, 500)
    assert drop == 0
    assert low < 0 < high
