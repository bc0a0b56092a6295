"""Outputs that cannot have been computed from the images: whatever their distance from a reference, they fail."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from deploykit.arrays import Array

LEAST_CELLS = 8
"""Outputs of fewer values an image may well be equal for two of them."""


def dead_outputs(reference: Mapping[str, Array], candidate: Mapping[str, Array]) -> dict[str, str]:
    """Say of each output of the candidate, ``(N, ...)``, what it cannot be and the reference is not.

    NaN or infinity; one value everywhere; all zeros for a channel's worth of images; the same answer for different
    images.
    """
    found = {name: _fault(values, candidate[name]) for name, values in reference.items() if name in candidate}
    return {name: fault for name, fault in found.items() if fault is not None}


def _fault(reference: Array, candidate: Array) -> str | None:
    wrong = int(np.count_nonzero(~np.isfinite(candidate)))
    if wrong:
        return f"{wrong} of {candidate.size} values are NaN or infinite"
    if candidate.size >= LEAST_CELLS and _is_constant(candidate) and not _is_constant(reference):
        return f"every value is {candidate.flat[0]:.4g}"
    if len(candidate) < 2 or candidate[0].size < LEAST_CELLS:
        return None
    same = _equal_pairs(candidate) - _equal_pairs(reference)
    if same:
        first, second = min(same)
        return f"images {first} and {second} get the same answer, and do not in the reference"
    return None


def _is_constant(values: Array) -> bool:
    return bool((values == values.flat[0]).all())


def _equal_pairs(values: Array) -> set[tuple[int, int]]:
    """Return the pairs of neighbouring images whose outputs are equal to the bit."""
    return {(i, i + 1) for i in range(len(values) - 1) if np.array_equal(values[i], values[i + 1])}
