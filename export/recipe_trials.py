"""``recipe="auto"``: the recipes of the table tried on calibration images that are held out."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import msgspec
import numpy as np

from deploykit.calibration.distillation import FEWEST_IMAGES
from deploykit.calibration.images import CalibrationSet, calibration_set
from deploykit.calibration.nncf_package import PACKAGE as NNCF
from deploykit.calibration.recipes import (
    AUTO_RECIPE,
    NOT_TRIED,
    RECIPES,
    RecipeReport,
    Trial,
    default_recipe,
    with_recipe,
)
from deploykit.calibration.search import Measured
from deploykit.errors import CalibrationError
from deploykit.export.job import ExportJob
from deploykit.optional import require_version
from deploykit.progress import CandidateMeasured, Progress, StageStarted
from deploykit.spec import Int8
from deploykit.store import Address, Store, address

MOST_IMAGES = 64
HELD_OUT_SHARE = 4
"""One of so many images is measured on and not calibrated with."""


def settle_recipe(
    job: ExportJob, progress: Progress, evaluate: Callable[[ExportJob, CalibrationSet], Measured]
) -> tuple[ExportJob, RecipeReport | None]:
    """Put the settings of its recipe into a job; report what was tried where that was left to measurement.

    Args:
        job: checked; as it is for any precision but INT8.
        progress: hears of each trial.
        evaluate: builds the engine of a job and compares it on other images.

    Raises:
        SpecError: no such recipe.
        CalibrationError: too few images to hold some out.
        MissingDependency: NNCF's recipe, and nncf is not installed.
    """
    settings = job.options.precision
    if not isinstance(settings, Int8) or job.images is None:
        return job, None
    if settings.recipe != AUTO_RECIPE:
        settled = with_recipe(settings, job.backbone.family)
        if settled.by_nncf:
            require_version(NNCF)
        return job.with_precision(settled), None
    progress(StageStarted(name="recipes"))
    report = _kept_report(job) or _try_recipes(job, settings, job.images, progress, evaluate)
    return job.with_precision(report.recipe.applied_to(settings)), report


def _try_recipes(
    job: ExportJob,
    settings: Int8,
    images: CalibrationSet,
    progress: Progress,
    evaluate: Callable[[ExportJob, CalibrationSet], Measured],
) -> RecipeReport:
    """Measure the family's recipe, then the table's in order while the budget has time, and take the best.

    The first is always tried; another only when there is time for one that takes as long as the longest so far.
    """
    calibrated, held_out = _split(images)
    started = time.monotonic()
    trials: list[Trial] = []
    untried: list[str] = []
    for name in dict.fromkeys((default_recipe(job.backbone.family), *RECIPES)):
        if name in NOT_TRIED:
            continue
        begun = time.monotonic()
        longest = max((trial.seconds for trial in trials), default=0.0)
        if trials and begun - started + longest > settings.recipe_budget_s:
            untried.append(name)
            continue
        recipe = RECIPES[name]
        tried = recipe.applied_to(settings)
        if tried.rounding == "distilled":
            if trials and _too_few_to_tune(calibrated, settings, begun - started):
                untried.append(name)
                continue
            tried = _within(tried, settings.recipe_budget_s - (begun - started))
        trial_job = job.with_precision(tried, calibrated).without_cache()
        found = evaluate(trial_job, held_out)
        seconds = round(time.monotonic() - begun, 1)
        trials.append(
            Trial(name=name, recipe=recipe, sqnr_db=found.sqnr_db, top1_agreement=found.top1_agreement, seconds=seconds)
        )
        progress(CandidateMeasured(summary=trials[-1].summary))
    report = RecipeReport(
        budget_s=settings.recipe_budget_s,
        calibrated=len(calibrated),
        held_out=len(held_out),
        trials=tuple(trials),
        untried=tuple(untried),
        chosen=max(trials, key=lambda trial: trial.sqnr_db).name,
    )
    _keep_report(job, report)
    return report


def _too_few_to_tune(calibrated: CalibrationSet, settings: Int8, spent_s: float) -> bool:
    """Return whether tuning has too few images, or less than half of the budget."""
    return len(calibrated) < FEWEST_IMAGES or 2 * spent_s > settings.recipe_budget_s


def _within(settings: Int8, seconds: float) -> Int8:
    """Return settings whose tuning ends with the budget."""
    return replace(settings, distill_minutes=min(settings.distill_minutes, max(seconds, 1.0) / 60))


def _split(images: CalibrationSet) -> tuple[CalibrationSet, CalibrationSet]:
    """Images to calibrate with and images to measure on, evenly spaced."""
    chosen = images.sample(MOST_IMAGES)
    held = np.arange(len(chosen)) % HELD_OUT_SHARE == HELD_OUT_SHARE - 1
    if not held.any():
        raise CalibrationError(
            f"recipe='auto' measures on images that it does not calibrate with, and only {len(chosen)} were given; "
            f"expected at least {HELD_OUT_SHARE}. Give more images, or choose a recipe by name."
        )
    spec = images.spec.as_images()
    return calibration_set(chosen[~held], spec), calibration_set(chosen[held], spec)


def _address(job: ExportJob) -> Address:
    return address("recipes", job.cache_parts(), title=job.title)


def _kept_report(job: ExportJob) -> RecipeReport | None:
    """Return the report of the same trials made before."""
    kept = Store().load(_address(job)) if job.options.cache else None
    if kept is None:
        return None
    try:
        return msgspec.json.decode(kept, type=RecipeReport)
    except msgspec.MsgspecError:  # whole, and of another version's form
        return None


def _keep_report(job: ExportJob, report: RecipeReport) -> None:
    if job.options.cache:
        Store().save(_address(job), msgspec.json.encode(report))
