"""Verify an engine: against torch, against what it gave itself, and against another engine on any images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from deploykit.errors import SpecError
from deploykit.parity.baseline import CHUNK, Baseline, FloatArray, LevelBaseline, Run, gain, sampled
from deploykit.parity.compare import LOGITS, ParityAccumulator, compare
from deploykit.parity.dead import dead_outputs
from deploykit.parity.drift import NAMED_CLASSES, RESPONSE_DB, find_drift, response_fault, with_drift
from deploykit.parity.metrics import sqnr_db
from deploykit.parity.probes import ImageArray, noisy_images
from deploykit.parity.reference import ParityReference, choose_positions
from deploykit.parity.report import MAX_SQNR_DB, LevelParity
from deploykit.spec import Precision

OTHER_IMAGES_DB = 6.0
"""By how much two engines may differ more on other images than on those of the export."""

MOST_EXPECTED_DB = 80.0
"""Two engines need not agree better than this, however near each is to torch."""

OTHER_CLASSES = 4.0
"""How many times as large as the median class's the error of one class may be, between two engines."""

OTHER_RESPONSE_DB = 1.5 * RESPONSE_DB
"""By how much the answer to noise may differ on other images."""

ALIKE_DB = 80.0
"""Outputs for two different images that agree better than this were not computed from them."""


def verify_levels(
    run: Run,
    reference: ParityReference,
    images: ImageArray,
    precision: Precision,
    baseline: Baseline | None,
    *,
    machine: str,
    generator: np.random.Generator,
) -> tuple[LevelParity, ...]:
    """Compare an engine with torch's outputs, and with its own of the export where the bundle carries them.

    Args:
        run: the engine.
        reference: of the bundle.
        images: its images, as the engine takes them.
        precision: with the budget.
        baseline: of the bundle; None: it is from version 0.1.0, or was exported where its device was not.
        machine: where the engine runs, by `deploykit.processor.machine_key`.
        generator: decides the order of the images and the noise.
    """
    order = generator.permutation(len(images))
    accumulator = ParityAccumulator(logits=reference.logits)
    dead: dict[str, str] = {}
    for start in range(0, len(order), CHUNK):
        chosen = order[start : start + CHUNK]
        expected = {name: values[chosen] for name, values in reference.expected.items()}
        found = reference.sample(run(images[chosen]))
        accumulator.update(expected, found)
        dead = dead_outputs(expected, found) | dead
    levels = accumulator.result(min_sqnr_db=precision.min_sqnr_db, min_top1_agreement=precision.min_top1_agreement)
    levels = tuple(
        replace(level, faults=(dead[level.name],), passed=False) if level.name in dead else level for level in levels
    )
    if baseline is None:
        return levels
    return with_drift(levels, find_drift(run, images, baseline, machine, generator))


def compare_engines(
    run: Run, other: Run, images: ImageArray, expected_db: Mapping[str, float]
) -> tuple[LevelParity, ...]:
    """Compare an engine with another on any images, level by level and class by class.

    Args:
        run: the engine.
        other: the reference.
        images: as both take them.
        expected_db: how near each level should be by what the bundles say of both, in dB.

    Raises:
        SpecError: the two give other outputs.
    """
    first = other(images[:1])
    if set(first) != set(expected_db):
        raise SpecError(
            f"the engine gives {', '.join(expected_db)} and the reference {', '.join(first)}. "
            "Fix: give a reference that was exported with the same outputs."
        )
    positions = {
        name: choose_positions(output[0].size, whole=_is_logits(name, output)) for name, output in first.items()
    }
    wanted, found = sampled(other, images, positions), sampled(run, images, positions)
    levels = []
    accumulator = ParityAccumulator(logits=LOGITS if _is_logits(LOGITS, first.get(LOGITS)) else None)
    accumulator.update(wanted, found)
    for level in accumulator.result(min_sqnr_db=-MAX_SQNR_DB):
        needed = min(expected_db[level.name] - OTHER_IMAGES_DB, MOST_EXPECTED_DB)
        is_logits = _is_logits(level.name, first[level.name])
        faults = _pair_faults(level.sqnr_db, needed, wanted[level.name], found[level.name], is_logits=is_logits)
        levels.append(replace(level, faults=tuple(faults), passed=level.passed and not faults))
    return tuple(levels)


def answer_levels(
    run: Run, images: ImageArray, baseline: Baseline | None, generator: np.random.Generator
) -> tuple[LevelParity, ...]:
    """Look for answers that were not computed from the images, where there is nothing to compare them with.

    The figures are those of the answers to the images with noise, against those without.
    """
    first = run(images[:1])
    positions = {name: choose_positions(output[0].size) for name, output in first.items()}
    found, noisy = sampled(run, images, positions), sampled(run, noisy_images(images, generator), positions)
    kept = baseline.levels if baseline is not None else {}
    levels = []
    for name, answers in found.items():
        faults = _answer_faults(answers, noisy[name], images, kept.get(name))
        before = {name: np.nan_to_num(answers, posinf=0.0, neginf=0.0)}  # a reference has to be finite
        (level,) = compare(before, {name: noisy[name]}, min_sqnr_db=-MAX_SQNR_DB, logits=None)
        if not np.isfinite(answers).all():
            level = replace(level, sqnr_db=-MAX_SQNR_DB)
        levels.append(replace(level, faults=tuple(faults), passed=level.passed and not faults))
    return tuple(levels)


def _pair_faults(figure: float, needed: float, wanted: FloatArray, found: FloatArray, *, is_logits: bool) -> list[str]:
    faults = []
    if figure < needed:
        faults.append(f"{figure:.1f} dB; at least {needed:.1f} dB by what both gave when they were exported")
    scaled, room = gain(wanted, found), max(0.02, 0.5 * 10 ** (-(needed + OTHER_IMAGES_DB) / 20))
    if abs(scaled) > room:
        faults.append(f"{1 + scaled:.3f} times the reference; within {room:.3f} of 1")
    if is_logits:
        errors = np.sqrt(((found.astype(np.float64) - wanted) ** 2).mean(axis=0))
        wrong = np.flatnonzero(errors > OTHER_CLASSES * np.median(errors))
        if wrong.size and np.median(errors) > 0:
            worst = wrong[np.argsort(-errors[wrong])][:NAMED_CLASSES]
            faults.append(
                f"class {', '.join(map(str, worst))}: {errors[worst[0]] / np.median(errors):.1f} times the "
                "error of the median class"
            )
    return faults


def _answer_faults(found: FloatArray, noisy: FloatArray, images: ImageArray, level: LevelBaseline | None) -> list[str]:
    if not (np.isfinite(found).all() and np.isfinite(noisy).all()):
        return ["NaN or infinity"]
    faults = []
    pairs = [
        (one, one + 1)
        for one in range(len(images) - 1)
        if not np.array_equal(images[one], images[one + 1]) and sqnr_db(found[one], found[one + 1]) > ALIKE_DB
    ]
    if pairs and (level is None or math.isfinite(level.response_db)):
        faults.append(f"the same answer for the images {pairs[0][0]} and {pairs[0][1]}, which differ")
    response = sqnr_db(found, noisy)
    if level is not None and math.isfinite(level.response_db) and abs(response - level.response_db) > OTHER_RESPONSE_DB:
        faults.append(response_fault(response, level.response_db))
    return faults


def _is_logits(name: str, output: npt.NDArray[Any] | None) -> bool:
    return name == LOGITS and output is not None and output.ndim == 2
