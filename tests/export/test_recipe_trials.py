from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from deploykit import create_backbone, export_backbone
from deploykit.calibration.images import calibration_set
from deploykit.calibration.plan import QuantizationPlan
from deploykit.calibration.recipes import FAMILY_RECIPES, NOT_TRIED, RECIPES, RecipeReport
from deploykit.calibration.search import Measured
from deploykit.errors import CalibrationError, SpecError
from deploykit.export import recipe_trials
from deploykit.export.job import ExportJob
from deploykit.export.pipeline import RECIPES_FILE
from deploykit.export.recipe_trials import settle_recipe
from deploykit.options import ExportOptions
from deploykit.progress import CandidateMeasured, quiet
from deploykit.spec import Fp16, Int8
from tests.backbones.realistic import randomize
from tests.small_resnet import SMALL


@pytest.fixture(scope="module")
def backbone():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomize(create_backbone(SMALL, image_size=64, num_classes=10)).eval()


@pytest.fixture
def few_recipes(monkeypatch, tmp_path):
    """Two recipes, and a cache of its own."""
    monkeypatch.setenv("DEPLOYKIT_CACHE", str(tmp_path / "cache"))
    whole = dict(RECIPES)
    for name in whole.keys() - {"plain", "wide"}:
        del RECIPES[name]
    yield
    RECIPES.clear()
    RECIPES.update(whole)  # in its order, which is that of the trials


def exported(backbone, photographs, folder, recipe, heard=None):
    return export_backbone(
        *(backbone, folder),
        runtime="onnxruntime",
        precision=Int8(recipe=recipe, recipe_budget_s=3600),
        calibration=photographs,
        progress=lambda event: isinstance(event, CandidateMeasured) and heard is not None and heard.append(event),
    )


def test_auto_takes_the_best_recipe_and_keeps_what_was_tried(backbone, photographs, tmp_path, few_recipes):
    heard = []
    result = exported(backbone, photographs, tmp_path / "bundle", "auto", heard)
    manifest, report = result.manifest, RecipeReport.load(tmp_path / "bundle" / RECIPES_FILE)
    assert result.recipes == report
    assert RECIPES_FILE in manifest.files
    assert [trial.name for trial in report.trials] == ["wide", "plain"]
    assert len(heard) == 2
    best, other = sorted(report.trials, key=lambda trial: trial.sqnr_db, reverse=True)
    assert best.sqnr_db > other.sqnr_db
    assert report.chosen == best.name
    settings = manifest.precision_settings
    assert (settings["rounding"], settings["equalization"]) == (best.recipe.rounding, best.recipe.equalization)
    assert bool(QuantizationPlan.load(tmp_path / "bundle").weights) == (best.recipe.rounding == "adaptive")
    again = []
    exported(backbone, photographs, tmp_path / "again", "auto", again)
    assert not again  # remembered
    assert RecipeReport.load(tmp_path / "again" / RECIPES_FILE) == report


@pytest.mark.slow
def test_a_recipe_by_name_is_used_without_trials(backbone, photographs, tmp_path, few_recipes):
    result = exported(backbone, photographs, tmp_path / "bundle", "plain")
    manifest = result.manifest
    assert result.recipes is None
    assert RECIPES_FILE not in manifest.files
    assert manifest.precision_settings["calibrator"] == RECIPES["plain"].calibrator
    assert manifest.precision_settings["equalization"] is None


def test_an_unknown_recipe_is_refused_before_any_work(backbone, photographs, tmp_path):
    with pytest.raises(SpecError, match="unknown recipe 'autoo'"):
        exported(backbone, photographs, tmp_path / "bundle", "autoo")
    assert not (tmp_path / "bundle").exists()


class Clock:
    """Seconds that pass only when a recipe is tried."""

    def __init__(self, each: float) -> None:
        self.now, self.each = 100.0, each

    def monotonic(self) -> float:
        return self.now


@functools.cache
def job_of(name: str = SMALL) -> ExportJob:
    """An INT8 export of 16 images that leaves the recipe to trials."""
    backbone = create_backbone(name, image_size=32)
    arrays = np.random.default_rng(0).normal(size=(16, 3, 32, 32)).astype(np.float32)
    options = ExportOptions(runtime="onnxruntime", precision=Int8(recipe="auto"), cache=False)
    return ExportJob(backbone=backbone, options=options, images=calibration_set(arrays, backbone.input_spec))


def tried(
    monkeypatch, figures: dict[str, float], *, seconds: float = 10, budget_s: float = 1000, name: str = SMALL
) -> RecipeReport:
    """The report of trials that give these figures in dB (10 where there is none) and take this long each."""
    clock = Clock(seconds)
    monkeypatch.setattr(recipe_trials, "time", clock)
    job = job_of(name).with_precision(Int8(recipe="auto", recipe_budget_s=budget_s))
    names = {recipe.applied_to(job.options.precision): name for name, recipe in RECIPES.items()}

    def evaluate(trial: ExportJob, held_out) -> Measured:
        clock.now += clock.each
        return Measured(sqnr_db=figures.get(names[trial.options.precision], 10.0), top1_agreement=0.5)

    settled, report = settle_recipe(job, quiet, evaluate)
    assert settled.options.precision == report.recipe.applied_to(job.options.precision)
    return report


TRIED = [name for name in RECIPES if name not in NOT_TRIED]


@pytest.mark.parametrize("best", TRIED)
def test_the_best_recipe_is_taken_wherever_it_stands(monkeypatch, best):
    report = tried(monkeypatch, {best: 20.0})
    assert (report.chosen, report.recipe) == (best, RECIPES[best])
    assert [trial.name for trial in report.trials] == TRIED
    assert not report.untried


def test_a_recipe_that_would_pass_the_budget_is_not_tried_and_named(monkeypatch):
    report = tried(monkeypatch, {TRIED[-1]: 99.0}, seconds=10, budget_s=25)
    assert [trial.name for trial in report.trials] == TRIED[:2]
    assert report.untried == tuple(TRIED[2:])
    assert report.chosen in TRIED[:2]


def test_the_first_recipe_is_tried_however_small_the_budget_is(monkeypatch):
    assert [trial.name for trial in tried(monkeypatch, {}, budget_s=0.1).trials] == list(RECIPES)[:1]


def test_the_familys_recipe_is_tried_first(monkeypatch):
    report = tried(monkeypatch, {}, name="vit_tiny_patch16_224")
    names = [trial.name for trial in report.trials]
    assert names[0] == FAMILY_RECIPES["vit"]
    assert sorted(names) == sorted(TRIED)


def test_settings_given_by_hand_stand_in_every_trial():
    seen = []

    def evaluate(trial: ExportJob, held_out) -> Measured:
        seen.append(trial)
        return Measured(sqnr_db=1.0)

    job = job_of().with_precision(Int8(recipe="auto", calibrator="entropy"))
    settled, _ = settle_recipe(job, quiet, evaluate)
    assert {trial.options.precision.calibrator for trial in (*seen, settled)} == {"entropy"}
    assert {trial.options.precision.rounding for trial in seen} == {"nearest", "adaptive", "distilled"}
    assert not any(trial.options.cache for trial in seen)


def test_trials_measure_on_images_that_they_do_not_calibrate_with(backbone, photographs):
    images = calibration_set(photographs, backbone.input_spec)
    seen = []

    def evaluate(trial: ExportJob, held_out) -> Measured:
        seen.append((trial.images, held_out))
        return Measured(sqnr_db=1.0)

    options = ExportOptions(runtime="onnxruntime", precision=Int8(recipe="auto"), cache=False)
    settled, report = settle_recipe(ExportJob(backbone=backbone, options=options, images=images), quiet, evaluate)
    assert settled.images is images
    calibrated, held_out = seen[0]
    assert (len(calibrated), len(held_out)) == (report.calibrated, report.held_out)
    assert len(calibrated) + len(held_out) == len(images)
    assert not {image.tobytes() for image in calibrated.images()} & {image.tobytes() for image in held_out.images()}


def test_too_few_images_to_hold_one_out_are_told(backbone, photographs):
    images = calibration_set(calibration_set(photographs, backbone.input_spec).sample(3), backbone.input_spec)
    options = ExportOptions(runtime="onnxruntime", precision=Int8(recipe="auto"), cache=False)
    job = ExportJob(backbone=backbone, options=options, images=images)
    with pytest.raises(CalibrationError, match="only 3 were given; expected at least 4"):
        settle_recipe(job, quiet, lambda trial, held_out: Measured(sqnr_db=1.0))


def test_a_precision_without_recipes_stays_as_it_is(backbone):
    job = ExportJob(backbone=backbone, options=ExportOptions(runtime="onnxruntime", precision=Fp16()))
    assert settle_recipe(job, quiet, lambda trial, held_out: Measured(sqnr_db=1.0)) == (job, None)
