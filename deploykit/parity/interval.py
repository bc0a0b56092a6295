"""How sure a share is that was counted on a few images."""

from __future__ import annotations

import math
from dataclasses import dataclass

from deploykit.errors import SpecError

Z_95 = 1.959963984540054
"""The quantile of the normal distribution for a two-sided 95% interval."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A share from 0 to 1, and the ends of its 95% interval."""

    share: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.share:.1%} ({self.low:.1%} to {self.high:.1%})"


def wilson(hits: int, total: int) -> Interval:
    """Return the share ``hits / total`` with its 95% interval (Wilson 1927), which also holds near 0 and 1.

    Raises:
        SpecError: no trials, or more hits than trials.
    """
    if total < 1 or not 0 <= hits <= total:
        raise SpecError(f"{hits} of {total} is no share; expected 0 to {total} hits of at least 1.")
    share, weight = hits / total, Z_95**2 / total
    middle = (share + weight / 2) / (1 + weight)
    half = Z_95 * math.sqrt(share * (1 - share) / total + weight / (4 * total)) / (1 + weight)
    return Interval(share=share, low=max(0.0, min(share, middle - half)), high=min(1.0, max(share, middle + half)))
