"""Every output of an engine against the reference's, level by level, in memory that does not grow."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeAlias

from deploykit.arrays import Array
from deploykit.errors import ParityError, SpecError
from deploykit.parity.metrics import ErrorSums, top1_matches
from deploykit.parity.report import MAX_MAX_ABS, MAX_RELATIVE_L2, LevelParity, capped

LOGITS = "logits"

Outputs: TypeAlias = Mapping[str, Array]


class ParityAccumulator:
    """Sums over batches of outputs; the result is that of all images at once.

    ``images`` is how many were seen. Memory is a few numbers a level. ``logits`` is the level of which top-1
    agreement is taken, where it is among them; None: of none, since a user's map may have that name too.
    """

    def __init__(self, *, logits: str | None = LOGITS) -> None:
        self.images = 0
        self._logits = logits
        self._sums: dict[str, ErrorSums] = {}
        self._matches = 0

    def update(self, reference: Outputs, candidate: Outputs) -> None:
        """Add one batch; every array is ``(N, ...)`` with one N.

        Raises:
            ParityError: a level is missing on one side, differs from earlier batches or in shape,
                or the reference is not finite. Nothing of the batch is added then.
        """
        check_levels(reference, candidate)
        if self._sums and set(self._sums) != set(reference):
            raise ParityError(
                f"this batch has the levels {sorted(reference)}; the earlier ones had {list(self._sums)}."
            )
        count = _batch_of(reference)
        sums: dict[str, ErrorSums] = {}
        matches = 0
        for name, expected in reference.items():
            try:
                sums[name] = ErrorSums.of(expected, candidate[name]) if count else ErrorSums()
                if name == self._logits and count:
                    matches = top1_matches(expected, candidate[name])
            except SpecError as error:
                raise ParityError(f"level {name!r}: {error}") from error
        self._sums = {name: self._sums.get(name, ErrorSums()) + each for name, each in sums.items()}
        self._matches += matches
        self.images += count

    def result(
        self, *, min_sqnr_db: float, min_top1_agreement: float | None = None, measured_on: str = "engine"
    ) -> tuple[LevelParity, ...]:
        """Return every level's figures, and whether they are within the budget.

        Args:
            min_sqnr_db: what every level must reach, in dB.
            min_top1_agreement: what the logits must reach, from 0 to 1; None: no gate.
            measured_on: what gave the candidate's outputs.

        Raises:
            ParityError: no images were seen.
            SpecError: a budget out of range, or a top-1 gate where there are no logits.
        """
        if self.images == 0:
            raise ParityError("no images were compared; expected at least one. Give parity images.")
        if not math.isfinite(min_sqnr_db):
            raise SpecError(f"min_sqnr_db is {min_sqnr_db}; it must be a finite number of dB.")
        if min_top1_agreement is not None:
            if not 0 <= min_top1_agreement <= 1:
                raise SpecError(f"min_top1_agreement is {min_top1_agreement}; it must be from 0 to 1.")
            if self._logits not in self._sums:
                raise SpecError(
                    f"min_top1_agreement needs {LOGITS!r}, and the outputs are {', '.join(self._sums)}. "
                    "Leave it out for features and embeddings."
                )
        return tuple(
            _level(
                name,
                sums,
                self._matches / self.images if name == self._logits else None,
                min_sqnr_db=min_sqnr_db,
                min_top1_agreement=min_top1_agreement,
                measured_on=measured_on,
            )
            for name, sums in self._sums.items()
        )


def compare(
    reference: Outputs,
    candidate: Outputs,
    *,
    min_sqnr_db: float,
    min_top1_agreement: float | None = None,
    measured_on: str = "engine",
    logits: str | None = LOGITS,
) -> tuple[LevelParity, ...]:
    """Return one batch of outputs, each ``(N, ...)``, against the reference's: see `ParityAccumulator`.

    Raises:
        ParityError: a level is missing on one side, shapes differ, there are no images, or the
            reference is not finite.
        SpecError: a budget out of range, or a top-1 gate where there are no logits.
    """
    accumulator = ParityAccumulator(logits=logits)
    accumulator.update(reference, candidate)
    return accumulator.result(min_sqnr_db=min_sqnr_db, min_top1_agreement=min_top1_agreement, measured_on=measured_on)


def check_levels(reference: Outputs, candidate: Outputs) -> None:
    """Both sides have the same levels, at least one.

    Raises:
        ParityError: names what either side lacks.
    """
    problems = []
    if missing := [name for name in reference if name not in candidate]:
        problems.append(f"the engine lacks {', '.join(missing)}")
    if extra := [name for name in candidate if name not in reference]:
        problems.append(f"the reference lacks {', '.join(extra)}")
    if problems:
        raise ParityError(
            f"the outputs cannot be compared: {'; '.join(problems)}. Both need the same levels: export again, or "
            "capture the reference with the engine's outputs."
        )
    if not reference:
        raise ParityError("there are no outputs to compare; expected at least one level.")


def _batch_of(reference: Outputs) -> int:
    counts = {name: array.shape[0] if array.ndim else None for name, array in reference.items()}
    if None in counts.values() or len(set(counts.values())) > 1:
        raise ParityError(f"the reference's levels have these numbers of images: {counts}; expected one (N, ...).")
    return int(next(iter(counts.values())) or 0)


def _level(
    name: str,
    sums: ErrorSums,
    agreement: float | None,
    *,
    min_sqnr_db: float,
    min_top1_agreement: float | None,
    measured_on: str,
) -> LevelParity:
    within = sums.sqnr_db >= min_sqnr_db
    if min_top1_agreement is not None and agreement is not None:
        within = within and agreement >= min_top1_agreement
    return LevelParity(
        name=name,
        sqnr_db=capped(sums.sqnr_db),
        cosine=sums.cosine,
        relative_l2=min(sums.relative_l2, MAX_RELATIVE_L2),
        max_abs=min(sums.max_abs, MAX_MAX_ABS),
        top1_agreement=agreement,
        measured_on=measured_on,
        passed=within,
    )
