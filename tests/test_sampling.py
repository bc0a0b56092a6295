from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploykit.sampling import hashed_fractions, sample_positions


def splitmix64(number: int) -> float:
    """The published routine, one number at a time."""
    whole = 2**64
    state = (number + 1) * 0x9E3779B97F4A7C15 % whole
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % whole
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB % whole
    return ((state ^ (state >> 31)) >> 11) / 2**53


@pytest.mark.parametrize("first", [0, 1, 10**12, 2**64 - 3])
def test_the_fractions_are_those_of_splitmix64(first):
    expected = [splitmix64((first + number) % 2**64) for number in range(50)]
    np.testing.assert_array_equal(hashed_fractions(first, 50), expected)


def test_fractions_are_evenly_spread():
    found = np.sort(hashed_fractions(7, 100_000))
    assert np.abs(found - np.arange(100_000) / 100_000).max() < 0.01


@settings(deadline=None)
@given(st.integers(1, 20_000), st.integers(0, 10**7), st.integers(0, 2**62))
def test_positions_are_ascending_inside_and_one_in_each_cell(count, surplus, first):
    size = count + surplus
    positions = sample_positions(size, count, first)
    assert positions.shape == (count,)
    assert positions[0] >= 0
    assert positions[-1] < size
    assert (np.diff(positions) >= 0).all()
    assert (np.abs(positions - (np.arange(count) + 0.5) * size / count) <= size / count / 2 + 1).all()


def test_other_numbers_give_other_positions():
    one, same, other = (sample_positions(10**6, 1000, first) for first in (0, 0, 1000))
    np.testing.assert_array_equal(one, same)
    assert np.mean(one == other) < 0.05


@pytest.mark.parametrize("ratio", [2.5, 3.2, 7.75, 16, 21.3])
def test_no_position_of_any_period_is_favoured(ratio):
    """Over many draws, whatever a position's remainder: also where cells are not whole numbers of elements."""
    count = 4096
    size = int(count * ratio)
    drawn = np.concatenate([sample_positions(size, count, first) for first in range(0, 200 * count, count)])
    for period in (2, 3, 5, 8, 13, 64, 89, 233):
        found = np.bincount(drawn % period, minlength=period) / len(drawn)
        expected = np.bincount(np.arange(size) % period, minlength=period) / size
        np.testing.assert_allclose(found, expected, rtol=0.1)


def test_positions_are_shared_and_cannot_be_written():
    positions = sample_positions(100, 10, 3)
    assert sample_positions(100, 10, 3) is positions
    with pytest.raises(ValueError, match="read-only"):
        positions[0] = 1
