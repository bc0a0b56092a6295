"""The rows of a comparison: levels, latency, size; each with what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from deploykit.changes.outputs import Between, Ran
from deploykit.changes.sides import Side
from deploykit.changes.tolerances import Tolerances
from deploykit.parity.interval import Interval
from deploykit.parity.report import with_unit

NEAR_DB = 1.0
"""A figure this near to its limit is said to be so."""

EXACT_DB = 100.0
"""Above this two engines differ by float32's roundings alone, and a change of some dB says nothing."""


@dataclass(frozen=True, kw_only=True)
class LevelChange:
    """One level or output of two bundles, in dB.

    ``old_db`` and ``new_db`` are against torch FP32, ``between_db`` of the new one against the old one; None: not
    known. ``measured`` is ``here`` where the engines ran, ``stored`` where the figures are those of the exports.
    ``failures`` say what is outside the tolerances, ``notes`` what is near.
    """

    name: str
    old_db: float | None
    new_db: float | None
    between_db: float | None = None
    agreement: Interval | None = None
    measured: str
    failures: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def drop_db(self) -> float | None:
        """By how much the new one is farther from torch; None where either is not known."""
        if self.old_db is None or self.new_db is None:
            return None
        return min(self.old_db, EXACT_DB) - min(self.new_db, EXACT_DB)


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One figure of each bundle in ``unit``; ``limit`` is what the new one may be over the old one; None: no gate."""

    name: str
    unit: str
    old: float
    new: float
    limit: float | None = None

    @property
    def ratio(self) -> float:
        """The new one over the old one."""
        return self.new / self.old if self.old else float("inf")

    @property
    def passed(self) -> bool:
        """Whether the ratio is within its limit."""
        return self.limit is None or self.ratio <= self.limit


@dataclass(frozen=True, kw_only=True)
class Gates:
    """What a level is held to, in dB, and its agreement as a share; None: no gate."""

    drop_db: float | None
    budget_db: float
    between_db: float | None
    agreement: float | None


def level_changes(old: Side, new: Side, ran: Ran, gates: Gates) -> Iterator[LevelChange]:
    """Yield every level shallow to deep: as the exports stored it, and as it is here where the engines ran."""
    stored = old.stored_db(), new.stored_db()
    for name in dict.fromkeys((*stored[0], *stored[1], *ran.old_db, *ran.new_db)):
        here = name in ran.old_db or name in ran.new_db
        figures = (ran.old_db, ran.new_db) if here else stored
        change = LevelChange(
            name=name,
            old_db=figures[0].get(name),
            new_db=figures[1].get(name),
            measured="here" if here else "stored",
        )
        yield _judged(change, ran.between.get(name), gates)


def measures(old: Side, new: Side, ran: Ran, tolerances: Tolerances) -> Iterator[Measure]:
    """Yield the size, and the latency where the engines ran."""
    yield Measure(name="size", unit="B", old=old.size, new=new.size, limit=tolerances.max_growth)
    if ran.latency_ms is not None:
        before, after = ran.latency_ms
        yield Measure(name="latency an image", unit="ms", old=before, new=after, limit=tolerances.max_slowdown)


def _judged(change: LevelChange, found: Between | None, gates: Gates) -> LevelChange:
    """Return a level with what is wrong with it, and with what is near its limit."""
    failures, notes = _against_torch(change, gates)
    if found is None:
        return replace(change, failures=tuple(failures), notes=tuple(notes))
    failures += [found.fault] if found.fault is not None else []
    needed = gates.between_db
    if needed is not None and found.sqnr_db < needed:
        failures.append(f"{with_unit(found.sqnr_db)} from the old outputs; expected at least {needed:g} dB")
    elif needed is not None and found.sqnr_db < needed + NEAR_DB:
        notes.append(f"{found.sqnr_db:.1f} dB from the old outputs, near the limit of {needed:g} dB")
    failures += _agreement_failures(found.agreement, gates.agreement)
    notes += _agreement_notes(found.agreement, gates.agreement)
    return replace(
        change,
        between_db=found.sqnr_db,
        agreement=found.agreement,
        failures=tuple(failures),
        notes=tuple(notes),
    )


def _against_torch(change: LevelChange, gates: Gates) -> tuple[list[str], list[str]]:
    failures, notes = [], []
    found, drop, limit = change.new_db, change.drop_db, gates.drop_db
    if found is not None and found < gates.budget_db:
        failures.append(f"{with_unit(found)} from torch; its own budget is {gates.budget_db:g} dB")
    elif found is not None and found < gates.budget_db + NEAR_DB:
        notes.append(f"{found:.1f} dB from torch, near its budget of {gates.budget_db:g} dB")
    if drop is not None and limit is not None and drop > limit:
        failures.append(f"{drop:.1f} dB farther from torch; allowed {limit:g}")
    elif drop is not None and limit is not None and drop > limit / 2 > 0:
        notes.append(f"{drop:.1f} dB farther from torch, near the {limit:g} dB that are allowed")
    return failures, notes


def _agreement_failures(found: Interval | None, gate: float | None) -> list[str]:
    if found is None or gate is None or found.share >= gate:
        return []
    return [f"the same class as before on {found} of the images; expected at least {gate:.1%}"]


def _agreement_notes(found: Interval | None, gate: float | None) -> list[str]:
    if found is None or gate is None or not found.low < gate <= found.share:
        return []
    return [f"the same class on {found}: too few images to say that it is above {gate:.1%}"]
