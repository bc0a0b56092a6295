"""Shares counted on a few images."""

from __future__ import annotations

import pytest

from deploykit.errors import SpecError
from deploykit.parity.interval import wilson


@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    [(10, 10, 0.7225, 1.0), (0, 10, 0.0, 0.2775), (8, 10, 0.4902, 0.9433), (81, 100, 0.7222, 0.8749)],
)
def test_it_is_wilsons_interval(hits, total, low, high):
    found = wilson(hits, total)
    assert (found.share, found.low, found.high) == pytest.approx((hits / total, low, high), abs=5e-5)


@pytest.mark.parametrize(("hits", "total"), [(0, 0), (3, 2), (-1, 2)])
def test_no_share_is_refused(hits, total):
    with pytest.raises(SpecError):
        wilson(hits, total)
