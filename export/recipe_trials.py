"""``recipe="auto"``: the recipes of the table tried on calibration images that are held out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from deploykit.cache import default_root
from deploykit.calibration.images import CalibrationSet, calibration_set
from deploykit.calibration.recipes import Recipe, RecipeReport, Trial, try_recipes
from deploykit.calibration.search import Measured
from deploykit.errors import CalibrationError
from deploykit.spec import Int8

MOST_IMAGES = 64
HELD_OUT_SHARE = 4
"""One of so many images is measured on and not calibrated with."""


def recipe_trials(
    settings: Int8,
    images: CalibrationSet,
    measure: Callable[[Int8, CalibrationSet, CalibrationSet], Measured],
    *,
    family: str,
    key: Mapping[str, object] | None,
    on_trial: Callable[[Trial], None] | None = None,
) -> RecipeReport:
    """Try the recipes on an engine that is calibrated with most of the images and measured on the others.

    Args:
        settings: the budget of time, and what is not of a recipe.
        images: at most `MOST_IMAGES` of them are used.
        measure: builds an engine of settings, calibrated with the first set, and compares it on the second.
        family: of the backbone, whose own recipe comes first.
        key: all that decides the outcome: a report under it in the plan cache is taken again; None keeps nothing.
        on_trial: hears of each.

    Raises:
        CalibrationError: fewer images than it takes to hold one out.
    """
    kept = _kept(key)
    if kept is not None and kept.exists():
        try:
            return RecipeReport.load(kept)
        except CalibrationError:
            kept.unlink()
    calibrated, held_out = _split(images)

    def measured(recipe: Recipe) -> Measured:
        return measure(recipe.applied_to(settings), calibrated, held_out)

    report = try_recipes(
        measured,
        family,
        budget_s=settings.recipe_budget_s,
        calibrated=len(calibrated),
        held_out=len(held_out),
        on_trial=on_trial,
    )
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        report.save(kept)
    return report


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


def _kept(key: Mapping[str, object] | None) -> Path | None:
    if key is None:
        return None
    digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()
    return default_root() / "plans" / f"{digest}.recipes.json"
