"""Whether an engine still gives what it gave when it was exported, level by level and class by class."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from deploykit.parity.baseline import (
    NOISY,
    Baseline,
    FloatArray,
    LevelBaseline,
    Run,
    asked_images,
    gain,
    sampled,
)
from deploykit.parity.metrics import sqnr_db
from deploykit.parity.probes import ImageArray, noisy_images
from deploykit.parity.report import MAX_SQNR_DB, LevelParity, capped

HERE = 0.02
"""On the machine of the export, with its versions and threads: the share of the spread by which outputs may move.
Reruns give equal bits there, which the export has checked, so this is room for what was not seen."""

ELSEWHERE, ELSEWHERE_CLASS, ELSEWHERE_GAIN = 1.5, 2.0, 0.005
"""On another: with other kernels (graph optimizations off, instruction sets hidden) outputs moved by at most 0.75 of
the spread, a class by 0.85 of the larger of its own and the median one's, and scaled by at most 0.002."""

LEAST = 1e-3
"""What may always move on another machine, relative to the output's root mean square; a thousandth of that here."""

RESPONSE_DB = 10.0
"""By how much the answer to noise in the images may differ from that when it was exported."""

NAMED_CLASSES = 5


@dataclass(frozen=True, kw_only=True)
class LevelDrift:
    """How one output differs from the export's: dB of what was and of what is needed, and what is wrong in words."""

    agreement_db: float
    min_agreement_db: float
    faults: tuple[str, ...]


def find_drift(
    run: Run, images: ImageArray, baseline: Baseline, machine: str, generator: np.random.Generator
) -> dict[str, LevelDrift]:
    """Run an engine on the images of its baseline, in any order, and on noisy ones that nobody has seen before.

    Args:
        run: the engine.
        images: the reference's, as the engine takes them.
        baseline: what it gave when it was exported.
        machine: where it runs, by `deploykit.processor.machine_key`.
        generator: decides the order of the images and the noise, so that no answers can be prepared.
    """
    positions = {name: level.positions for name, level in baseline.levels.items()}
    asked = asked_images(images)
    order = generator.permutation(len(asked))
    found = sampled(run, asked[order], positions)
    noisy = sampled(run, noisy_images(images[:NOISY], generator), positions)
    back = np.argsort(order)
    same = bool(machine) and machine == baseline.machine
    return {
        name: _level_drift(level, found[name][back], noisy[name], same=same) for name, level in baseline.levels.items()
    }


def with_drift(levels: tuple[LevelParity, ...], drift: Mapping[str, LevelDrift]) -> tuple[LevelParity, ...]:
    """Put what drifted into the figures of the levels; a level with a fault fails."""
    found = []
    for level in levels:
        own = drift.get(level.name)
        if own is None:
            found.append(level)
            continue
        found.append(
            replace(
                level,
                agreement_db=own.agreement_db,
                min_agreement_db=own.min_agreement_db,
                faults=(*level.faults, *own.faults),
                passed=level.passed and not own.faults,
            )
        )
    return tuple(found)


def _level_drift(level: LevelBaseline, found: FloatArray, noisy: FloatArray, *, same: bool) -> LevelDrift:
    if not (np.isfinite(found).all() and np.isfinite(noisy).all()):
        return LevelDrift(agreement_db=-MAX_SQNR_DB, min_agreement_db=0.0, faults=("NaN or infinity",))
    size = math.sqrt(float((level.values.astype(np.float64) ** 2).mean()))
    error = found.astype(np.float64) - level.values
    allowed = max(level.spread * (HERE if same else ELSEWHERE), size * LEAST * (1e-3 if same else 1.0))
    agreement = capped(sqnr_db(level.values, found))
    needed = capped(20 * math.log10(size / allowed)) if size and allowed else MAX_SQNR_DB
    faults = []
    if agreement < needed:
        faults.append(f"{agreement:.1f} dB from what it gave when exported; at least {needed:.1f} dB")
    scaled, room = gain(level.values, found), max(ELSEWHERE_GAIN, 2 * level.gain_spread)
    if abs(scaled) > room:
        faults.append(f"{1 + scaled:.3f} times what it gave when exported; within {room:.3f} of 1")
    faults += _class_faults(level, error, size, same=same)
    faults += _response_faults(level, found[: len(noisy)], noisy)
    return LevelDrift(agreement_db=agreement, min_agreement_db=needed, faults=tuple(faults))


def _class_faults(level: LevelBaseline, error: npt.NDArray[np.float64], size: float, *, same: bool) -> list[str]:
    """Name the classes that moved by more than the others do."""
    if not level.class_spread.size:
        return []
    usual = np.maximum(level.class_spread, np.median(level.class_spread)).astype(np.float64)
    allowed = np.maximum(usual * (HERE if same else ELSEWHERE_CLASS), size * LEAST * (1e-3 if same else 1.0))
    ratio = np.sqrt((error**2).mean(axis=0)) / np.maximum(allowed, np.finfo(np.float64).tiny)
    wrong = np.flatnonzero(ratio > 1)
    if not wrong.size:
        return []
    worst = wrong[np.argsort(-ratio[wrong])]
    more = f" and {wrong.size - NAMED_CLASSES} more" if wrong.size > NAMED_CLASSES else ""
    names = ", ".join(map(str, worst[:NAMED_CLASSES]))
    return [f"class {names}{more}: up to {ratio[worst[0]]:.1f} times as far from the export as roundings explain"]


def _response_faults(level: LevelBaseline, quiet: FloatArray, noisy: FloatArray) -> list[str]:
    """Say so where the answer to a small change of the images is not that of the network that was exported."""
    if not math.isfinite(level.response_db):
        return []
    found = sqnr_db(quiet, noisy)
    if abs(found - level.response_db) <= RESPONSE_DB:
        return []
    return [response_fault(found, level.response_db)]


def response_fault(found: float, exported: float) -> str:
    """Say that an engine answers noise in its images as the exported one did not, both in dB."""
    return (
        f"noise in the images moves it by {capped(found):.1f} dB, and did by {exported:.1f} dB when exported: "
        "the answers do not follow the images"
    )
