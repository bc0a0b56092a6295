from __future__ import annotations

import pytest
import torch

from deploykit import create_backbone, export_backbone
from deploykit.calibration import recipes
from deploykit.calibration.images import calibration_set
from deploykit.calibration.plan import QuantizationPlan
from deploykit.calibration.recipes import RECIPES, RecipeReport
from deploykit.calibration.search import Measured
from deploykit.errors import CalibrationError, SpecError
from deploykit.export.pipeline import RECIPES_FILE, Progress
from deploykit.export.recipe_trials import recipe_trials
from deploykit.spec import Int8
from tests.backbones.realistic import randomize


@pytest.fixture(scope="module")
def backbone():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomize(create_backbone("regnetx_002", image_size=64, num_classes=10)).eval()


@pytest.fixture
def few_recipes(monkeypatch, tmp_path):
    """Two recipes, and a cache of its own."""
    monkeypatch.setenv("DEPLOYKIT_CACHE", str(tmp_path / "cache"))
    for name in [name for name in RECIPES if name not in ("plain", "adaptive")]:
        monkeypatch.delitem(recipes.RECIPES, name)


def exported(backbone, photographs, folder, recipe, heard=None):
    return export_backbone(
        *(backbone, folder),
        runtime="onnxruntime",
        precision=Int8(recipe=recipe),
        calibration=photographs,
        progress=Progress(candidate=heard.append if heard is not None else lambda line: None),
    )


def test_auto_takes_the_best_recipe_and_keeps_what_was_tried(backbone, photographs, tmp_path, few_recipes):
    heard = []
    manifest = exported(backbone, photographs, tmp_path / "bundle", "auto", heard)
    report = RecipeReport.load(tmp_path / "bundle" / RECIPES_FILE)
    assert RECIPES_FILE in manifest.files
    assert [trial.name for trial in report.trials] == ["adaptive", "plain"]
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


def test_a_recipe_by_name_is_used_without_trials(backbone, photographs, tmp_path, few_recipes):
    manifest = exported(backbone, photographs, tmp_path / "bundle", "plain")
    assert RECIPES_FILE not in manifest.files
    assert manifest.precision_settings["calibrator"] == RECIPES["plain"].calibrator
    assert manifest.precision_settings["equalization"] is None


def test_an_unknown_recipe_is_refused_before_any_work(backbone, photographs, tmp_path):
    with pytest.raises(SpecError, match="unknown recipe 'autoo'"):
        exported(backbone, photographs, tmp_path / "bundle", "autoo")
    assert not (tmp_path / "bundle").exists()


def test_trials_measure_on_images_that_they_do_not_calibrate_with(backbone, photographs):
    images = calibration_set(photographs, backbone.input_spec)
    seen = []

    def measure(settings, calibrated, held_out):
        seen.append((calibrated, held_out))
        return Measured(sqnr_db=1.0)

    report = recipe_trials(Int8(recipe="auto"), images, measure, family="regnet", key=None)
    calibrated, held_out = seen[0]
    assert (len(calibrated), len(held_out)) == (report.calibrated, report.held_out)
    assert len(calibrated) + len(held_out) == len(images)
    assert not {image.tobytes() for image in calibrated.images()} & {image.tobytes() for image in held_out.images()}


def test_too_few_images_to_hold_one_out_are_told(backbone, photographs):
    images = calibration_set(calibration_set(photographs, backbone.input_spec).sample(3), backbone.input_spec)
    with pytest.raises(CalibrationError, match="only 3 were given; expected at least 4"):
        recipe_trials(Int8(recipe="auto"), images, lambda *sets: Measured(sqnr_db=1.0), family="regnet", key=None)
