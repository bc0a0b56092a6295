"""Budgets of the caller's own: hold a report to other limits than those that the bundle was exported with."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from deploykit.errors import SpecError
from deploykit.parity.report import MAX_SQNR_DB, LevelParity, ParityReport

EXACT_DB = 100.0
"""Above this an engine differs by float32's roundings alone, and a drop of some dB says nothing."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a report is held to; None: what the bundle says.

    Args:
        min_sqnr_db: what every level must reach, in dB.
        min_top1_agreement: what logits must reach, from 0 to 1.
        max_drop_db: by how much a level may be farther from torch than it was when exported, in dB.

    Raises:
        SpecError: a number out of range.
    """

    min_sqnr_db: float | None = None
    min_top1_agreement: float | None = None
    max_drop_db: float | None = None

    def __post_init__(self) -> None:
        if self.min_sqnr_db is not None and not math.isfinite(self.min_sqnr_db):
            raise SpecError(f"min_sqnr_db is {self.min_sqnr_db}; it must be a finite number of dB.")
        if self.min_top1_agreement is not None and not 0 <= self.min_top1_agreement <= 1:
            raise SpecError(f"min_top1_agreement is {self.min_top1_agreement}; it must be from 0 to 1.")
        if self.max_drop_db is not None and not 0 <= self.max_drop_db < math.inf:
            raise SpecError(f"max_drop_db is {self.max_drop_db}; expected at least 0 dB.")

    def hold(self, report: ParityReport, exported: ParityReport | None) -> ParityReport:
        """Return a report that is judged by this budget.

        Args:
            report: of an engine against torch.
            exported: what the bundle says that it gave when exported; None: nothing.

        Raises:
            SpecError: a top-1 gate where there are no logits, or a drop where the export stored nothing.
        """
        if self == Budget():
            return report
        least = report.min_sqnr_db if self.min_sqnr_db is None else self.min_sqnr_db
        share = report.min_top1_agreement if self.min_top1_agreement is None else self.min_top1_agreement
        if self.min_top1_agreement is not None and all(level.top1_agreement is None for level in report.levels):
            names = ", ".join(level.name for level in report.levels)
            raise SpecError(f"min_top1_agreement needs logits, and the outputs are {names}. Leave it out.")
        levels = tuple(_judged(self._with_drop(level, exported), least, share) for level in report.levels)
        return replace(report, min_sqnr_db=least, min_top1_agreement=share, levels=levels)

    def _with_drop(self, level: LevelParity, exported: ParityReport | None) -> LevelParity:
        if self.max_drop_db is None:
            return level
        stored = {each.name: each.sqnr_db for each in (exported.levels if exported is not None else ())}
        if level.name not in stored:
            raise SpecError(
                f"max_drop_db needs what {level.name} gave when it was exported, and the bundle does not carry it. "
                "Fix: leave it out, or give min_sqnr_db."
            )
        drop = min(stored[level.name], EXACT_DB) - min(level.sqnr_db, EXACT_DB)
        if drop <= self.max_drop_db:
            return level
        fault = f"{drop:.1f} dB farther from torch than when exported; allowed {self.max_drop_db:g}"
        return replace(level, faults=(*level.faults, fault))


def _judged(level: LevelParity, least: float, share: float | None) -> LevelParity:
    near = level.sqnr_db >= least and level.sqnr_db > -MAX_SQNR_DB
    agrees = share is None or level.top1_agreement is None or level.top1_agreement >= share
    return replace(level, passed=near and agrees and not level.faults)
