from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from deploykit.backbones.registry import backbone_class, backbone_names
from deploykit.calibration import recipes
from deploykit.calibration.recipes import FAMILY_RECIPES, RECIPES, Recipe, RecipeReport, try_recipes, with_recipe
from deploykit.calibration.search import Measured
from deploykit.errors import CalibrationError, SpecError
from deploykit.spec import RECIPE_SETTINGS, Int8, parse_precision


class Clock:
    """Seconds that pass only when a recipe is tried."""

    def __init__(self, each: float) -> None:
        self.now, self.each = 100.0, each

    def monotonic(self) -> float:
        return self.now


def tried(
    monkeypatch, figures: dict[str, float], *, seconds: float = 10, budget_s: float = 1000, family: str = "resnet"
) -> RecipeReport:
    clock = Clock(seconds)
    monkeypatch.setattr(recipes, "time", clock)
    names = {id(recipe): name for name, recipe in RECIPES.items()}

    def measure(recipe: Recipe) -> Measured:
        clock.now += clock.each
        return Measured(sqnr_db=figures.get(names[id(recipe)], 10.0), top1_agreement=0.5)

    return try_recipes(measure, family, budget_s=budget_s, calibrated=12, held_out=4)


@pytest.mark.parametrize("best", RECIPES)
def test_the_best_recipe_is_taken_wherever_it_stands(monkeypatch, best):
    report = tried(monkeypatch, {best: 20.0})
    assert (report.chosen, report.recipe) == (best, RECIPES[best])
    assert [trial.name for trial in report.trials] == list(RECIPES)
    assert not report.untried


def test_a_recipe_that_would_pass_the_budget_is_not_tried_and_named(monkeypatch):
    report = tried(monkeypatch, {list(RECIPES)[-1]: 99.0}, seconds=10, budget_s=25)
    assert [trial.name for trial in report.trials] == list(RECIPES)[:2]
    assert report.untried == tuple(list(RECIPES)[2:])
    assert report.chosen in list(RECIPES)[:2]


def test_the_first_recipe_is_tried_however_small_the_budget_is(monkeypatch):
    assert [trial.name for trial in tried(monkeypatch, {}, budget_s=0.1).trials] == list(RECIPES)[:1]


def test_a_report_is_saved_loaded_and_shown(monkeypatch, tmp_path):
    report = tried(monkeypatch, {"adaptive": 20.0}, budget_s=45)
    report.save(tmp_path / "recipes.json")
    assert RecipeReport.load(tmp_path / "recipes.json") == report
    (tmp_path / "recipes.json").write_text("{}")
    with pytest.raises(CalibrationError, match="not a report of recipes"):
        RecipeReport.load(tmp_path / "recipes.json")
    table = report.render()
    assert table.row_count == len(report.trials)
    assert "no time for" in str(table.caption)


def test_a_recipe_changes_the_settings_that_it_names_and_no_others():
    before = Int8(min_sqnr_db=3, float_dtype="fp16", recipe="auto", calibrator="entropy")
    after = RECIPES["adaptive"].applied_to(before)
    assert (after.min_sqnr_db, after.float_dtype, after.recipe) == (3, "fp16", None)
    assert {field.name: getattr(after, field.name) for field in dataclasses.fields(Recipe)} == dataclasses.asdict(
        RECIPES["adaptive"]
    )


def test_every_recipe_makes_valid_settings_and_no_two_are_alike():
    made = [recipe.applied_to(Int8()) for recipe in RECIPES.values()]
    assert len(set(made)) == len(RECIPES)


def test_an_unknown_recipe_is_told_with_its_neighbours():
    with pytest.raises(SpecError, match=r"unknown recipe 'adaptiv'\. Did you mean 'adaptive'"):
        with_recipe(Int8(recipe="adaptiv"), "resnet")


def test_a_family_has_its_own_recipe_unless_a_setting_is_given_by_hand():
    assert Int8().recipe == Int8(min_sqnr_db=3, reduce_range=True).recipe == "family"
    for family, name in FAMILY_RECIPES.items():
        assert with_recipe(Int8(), family) == RECIPES[name].applied_to(Int8())
        assert RECIPES[name] != next(iter(RECIPES.values()))
    assert with_recipe(Int8(), "of a user") == RECIPES["fast"].applied_to(Int8()) == Int8(recipe=None)
    assert set(FAMILY_RECIPES) <= {backbone_class(name).family for name in backbone_names()}


@pytest.mark.parametrize("by_hand", [{"calibrator": "entropy"}, {"equalization": None}, {"bias_correction": False}])
def test_settings_given_by_hand_stand(by_hand):
    settings = Int8(**by_hand)
    assert settings.recipe is None
    assert with_recipe(settings, "vit") == settings
    assert with_recipe(Int8(recipe="plain", **by_hand), "vit") == RECIPES["plain"].applied_to(Int8())


def test_a_setting_that_is_named_stands_also_where_it_has_its_defaults_value():
    assert parse_precision("int8").recipe == parse_precision("int8", {"min_sqnr_db": 3}).recipe == "family"
    assert parse_precision("int8", {"calibrator": "mse"}) == Int8(recipe=None)
    assert parse_precision("int8", {"calibrator": "mse", "recipe": "full"}).recipe == "full"


def test_the_settings_of_a_recipe_are_those_that_turn_the_familys_off():
    assert {field.name for field in dataclasses.fields(Recipe)} == set(RECIPE_SETTINGS)


def test_the_familys_recipe_is_tried_first(monkeypatch):
    report = tried(monkeypatch, {}, family="vit")
    names = [trial.name for trial in report.trials]
    assert names[0] == FAMILY_RECIPES["vit"]
    assert sorted(names) == sorted(RECIPES)


def test_the_page_shows_the_table_as_it_is():
    page = (Path(__file__).parents[2] / "docs" / "quantization.md").read_text(encoding="utf-8")
    for name, recipe in RECIPES.items():
        parts = (recipe.calibrator, recipe.equalization or "none", recipe.rounding, recipe.weight_scales)
        row = f"| {' | '.join(map(str, (*parts, recipe.bias_correction or 'none')))} |"
        assert any(line.startswith(f"| `{name}`") and line.endswith(row) for line in page.splitlines()), row
