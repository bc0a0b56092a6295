"""Shares of right answers: their confidence intervals, and whether two models differ on the same images."""

from __future__ import annotations

import math

Z = 1.959963984540054
"""The normal quantile of two-sided 95%."""


def wilson(right: int, images: int) -> tuple[float, float]:
    """Return the 95% interval of a share, from 0 to 1 (Wilson 1927, "Probable inference").

    Args:
        right: how many of the images were right.
        images: how many there were, at least 1.
    """
    share, shrink = right / images, 1 + Z * Z / images
    middle = (share + Z * Z / (2 * images)) / shrink
    half = Z / shrink * math.sqrt(share * (1 - share) / images + Z * Z / (4 * images * images))
    # At the ends the formula gives 0 and 1 but for rounding.
    return (0.0 if right == 0 else max(0.0, middle - half), 1.0 if right == images else min(1.0, middle + half))


def mcnemar(lost: int, won: int) -> float:
    """Return the two-sided p-value of McNemar's exact test: that two models are equally often right.

    Args:
        lost: images that the first model had right and the second has wrong.
        won: those that the second alone has right.
    """
    total, least = lost + won, min(lost, won)
    if 2 * least == total:  # also no difference at all
        return 1.0
    # Terms of the binomial distribution in logarithms: 2^-total underflows from 1,075 on.
    logs = [math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1) for k in range(least + 1)]
    most = max(logs)
    tail = math.log(math.fsum(math.exp(each - most) for each in logs)) + most - total * math.log(2)
    return min(1.0, 2 * math.exp(tail))


def paired_drop(lost: int, won: int, images: int) -> tuple[float, float, float]:
    """Return how much lower the second model's share is, from -1 to 1, and the 95% interval of that.

    Agresti and Min (2005), "Simple improved confidence intervals for comparing matched proportions".

    Args:
        lost: as for `mcnemar`.
        won: as for `mcnemar`.
        images: how many images both models ran on, at least 1.
    """
    total, down, up = images + 2, lost + 0.5, won + 0.5
    middle = (down - up) / total
    half = Z * math.sqrt(max(0.0, down + up - (down - up) ** 2 / total)) / total
    return (lost - won) / images, max(-1.0, middle - half), min(1.0, middle + half)
