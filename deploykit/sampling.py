"""Positions that stand for a whole flat array, whatever the layout of the tensor that it was.

One position falls into each of ``count`` equal cells. Where in its cell follows from a hash of the cell's
number: a fixed step shares a factor with the width, the channels or the tokens of most tensors and reads a few
of them only, and so does any low-discrepancy sequence at some sizes.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

_GAMMA = 0x9E3779B97F4A7C15
_FIRST_MULTIPLIER = 0xBF58476D1CE4E5B9
_SECOND_MULTIPLIER = 0x94D049BB133111EB


def hashed_fractions(first: int, count: int) -> npt.NDArray[np.float64]:
    """Hash the integers ``first``, ``first + 1``, ... to ``(count,)`` fractions, evenly spread over [0, 1).

    SplitMix64 (Steele et al. 2014, "Fast Splittable Pseudorandom Number Generators"): equal on every machine.
    """
    state = np.arange(1, count + 1, dtype=np.uint64) + np.uint64(first % 2**64)
    state *= np.uint64(_GAMMA)
    state ^= state >> np.uint64(30)
    state *= np.uint64(_FIRST_MULTIPLIER)
    state ^= state >> np.uint64(27)
    state *= np.uint64(_SECOND_MULTIPLIER)
    state ^= state >> np.uint64(31)
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


@lru_cache(maxsize=8)
def sample_positions(size: int, count: int, first: int = 0) -> npt.NDArray[np.int64]:
    """Choose ``count`` of ``size`` positions, ascending; every position is as likely as every other.

    Two neighbouring cells may share an element, so one may be chosen twice where ``count`` is near ``size``. The array
    is read-only: tensors of one size, of which a network has many, share it.

    Args:
        size: how many elements the array has, at least ``count``.
        count: how many positions to choose.
        first: the hash's first number: other numbers give other positions.
    """
    cells = np.arange(count, dtype=np.float64) + hashed_fractions(first, count)
    positions = np.minimum((cells * (size / count)).astype(np.int64), size - 1)
    positions.flags.writeable = False
    return positions
