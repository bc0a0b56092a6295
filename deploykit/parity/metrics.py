"""How far two arrays are apart, in float64, without tolerances that depend on their range.

With r the reference, c the candidate and sums over all values:

- SQNR = 10 log10(sum r^2 / sum (c - r)^2), in dB; higher is better
- relative L2 = sqrt(sum (c - r)^2 / sum r^2) = 10^(-SQNR / 20)
- cosine = sum r c / sqrt(sum r^2 sum c^2), from -1 to 1
- max-abs = max |c - r|, in the output's own unit
- top-1 agreement = the share of images whose largest logit is the same class, from 0 to 1

Two equal arrays, also two arrays of zeros, are a perfect match (inf dB). Against a reference of
zeros any other candidate is -inf dB. A candidate with NaN or infinity is the worst that can be:
-inf dB, relative L2 and max-abs inf, cosine 0. A reference with them is an error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from deploykit.arrays import Array
from deploykit.errors import SpecError

_PIECE = 1 << 18


@dataclass(frozen=True, kw_only=True)
class ErrorSums:
    """The sums that every metric is made of; those of two batches add up to those of both."""

    reference_power: float = 0.0
    candidate_power: float = 0.0
    noise_power: float = 0.0
    product: float = 0.0
    max_abs: float = 0.0
    finite: bool = True

    @classmethod
    def of(cls, reference: Array, candidate: Array) -> ErrorSums:
        """Return the sums over two arrays of one shape, of any real dtype.

        Raises:
            SpecError: different shapes, no values, or a reference that is not finite.
        """
        check_pair(reference, candidate)
        total = cls()
        flat_reference, flat_candidate = reference.reshape(-1), candidate.reshape(-1)
        for start in range(0, flat_reference.size, _PIECE):
            piece = slice(start, start + _PIECE)
            total += _sums_of_piece(flat_reference[piece].astype(np.float64), flat_candidate[piece].astype(np.float64))
        return total

    def __add__(self, other: ErrorSums) -> ErrorSums:
        return ErrorSums(
            reference_power=self.reference_power + other.reference_power,
            candidate_power=self.candidate_power + other.candidate_power,
            noise_power=self.noise_power + other.noise_power,
            product=self.product + other.product,
            max_abs=max(self.max_abs, other.max_abs),
            finite=self.finite and other.finite,
        )

    @property
    def sqnr_db(self) -> float:
        """See `sqnr_db`."""
        if not self.finite:
            return -math.inf
        if self.noise_power == 0:
            return math.inf
        if self.reference_power == 0:
            return -math.inf
        return 10 * (math.log10(self.reference_power) - math.log10(self.noise_power))

    @property
    def relative_l2(self) -> float:
        """See `relative_l2`."""
        if not self.finite:
            return math.inf
        if self.noise_power == 0:
            return 0.0
        if self.reference_power == 0:
            return math.inf
        return math.sqrt(self.noise_power) / math.sqrt(self.reference_power)

    @property
    def cosine(self) -> float:
        """See `cosine`."""
        if not self.finite:
            return 0.0
        norms = math.sqrt(self.reference_power) * math.sqrt(self.candidate_power)
        if norms == 0:
            return 1.0 if self.noise_power == 0 else 0.0
        return min(1.0, max(-1.0, self.product / norms))


def sqnr_db(reference: Array, candidate: Array) -> float:
    """Return 10 log10(sum r^2 / sum (c - r)^2) in dB; inf for equal arrays, -inf for a candidate with NaN.

    Raises:
        SpecError: different shapes, no values, or a reference that is not finite.
    """
    return ErrorSums.of(reference, candidate).sqnr_db


def cosine(reference: Array, candidate: Array) -> float:
    """Return the cosine of the angle between the flattened arrays; 1 for two zeros, 0 for one.

    Raises:
        SpecError: different shapes, no values, or a reference that is not finite.
    """
    return ErrorSums.of(reference, candidate).cosine


def relative_l2(reference: Array, candidate: Array) -> float:
    """sqrt(sum (c - r)^2 / sum r^2); 0 for equal arrays, inf against a reference of zeros.

    Raises:
        SpecError: different shapes, no values, or a reference that is not finite.
    """
    return ErrorSums.of(reference, candidate).relative_l2


def max_abs(reference: Array, candidate: Array) -> float:
    """Return the largest |c - r|, in the output's own unit; inf for a candidate with NaN.

    Raises:
        SpecError: different shapes, no values, or a reference that is not finite.
    """
    return ErrorSums.of(reference, candidate).max_abs


def top1_agreement(reference: Array, candidate: Array) -> float:
    """Return the share of rows of two ``(N, K)`` arrays of logits with the same largest class.

    Of equal logits the first counts; a row of the candidate with NaN or infinity disagrees.

    Raises:
        SpecError: not two arrays of one shape ``(N, K)``, no values, or a reference that is not finite.
    """
    return top1_matches(reference, candidate) / len(reference)


def top1_matches(reference: Array, candidate: Array) -> int:
    """Return the number of rows that `top1_agreement` is the share of."""
    check_pair(reference, candidate)
    if reference.ndim != 2:
        raise SpecError(f"the logits have shape {reference.shape}; expected (N, classes).")
    if not np.isfinite(reference).all():
        raise SpecError(_NOT_FINITE)
    usable = np.isfinite(candidate).all(axis=1)
    return int(np.count_nonzero(usable & (reference.argmax(axis=1) == candidate.argmax(axis=1))))


def check_pair(reference: Array, candidate: Array) -> None:
    """Two arrays that can be compared.

    Raises:
        SpecError: different shapes, or no values.
    """
    if reference.shape != candidate.shape:
        raise SpecError(f"the candidate has shape {candidate.shape}; expected the reference's {reference.shape}.")
    if reference.size == 0:
        raise SpecError(f"the arrays have shape {reference.shape}, which holds no values; nothing can be compared.")


_NOT_FINITE = "the reference holds NaN or infinity, so nothing can be compared with it. Check the weights and images."


def _sums_of_piece(reference: npt.NDArray[np.float64], candidate: npt.NDArray[np.float64]) -> ErrorSums:
    reference_power = float(np.dot(reference, reference))
    if not math.isfinite(reference_power):
        raise SpecError(_NOT_FINITE)
    candidate_power = float(np.dot(candidate, candidate))
    if not math.isfinite(candidate_power):
        return ErrorSums(reference_power=reference_power, max_abs=math.inf, finite=False)
    noise = candidate - reference
    return ErrorSums(
        reference_power=reference_power,
        candidate_power=candidate_power,
        noise_power=float(np.dot(noise, noise)),
        product=float(np.dot(reference, candidate)),
        max_abs=float(np.abs(noise).max()),
    )
