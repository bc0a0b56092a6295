from __future__ import annotations

import dataclasses
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from deploykit.backbones.registry import backbone_class, backbone_names
from deploykit.calibration.recipes import FAMILY_RECIPES, RECIPES, Recipe, RecipeReport, Trial, recipe_of, with_recipe
from deploykit.errors import CalibrationError, SpecError
from deploykit.spec import RECIPE_DEFAULTS, Int8, parse_precision
from deploykit.unset import UNSET


def test_a_report_is_saved_loaded_and_shown(tmp_path):
    names = list(RECIPES)[:2]
    report = RecipeReport(
        budget_s=45,
        calibrated=12,
        held_out=4,
        trials=tuple(Trial(name=name, recipe=RECIPES[name], sqnr_db=20.0, seconds=10.0) for name in names),
        untried=tuple(RECIPES)[2:],
        chosen=names[1],
    )
    report.save(tmp_path / "recipes.json")
    assert RecipeReport.load(tmp_path / "recipes.json") == report
    assert report.recipe == RECIPES[names[1]]
    (tmp_path / "recipes.json").write_text("{}")
    with pytest.raises(CalibrationError, match="not a report of recipes"):
        RecipeReport.load(tmp_path / "recipes.json")
    table = report.render()
    assert table.row_count == len(report.trials)
    assert "no time for" in str(table.caption)


def test_a_recipe_fills_the_settings_that_were_not_given_and_no_others():
    before = Int8(min_sqnr_db=3, float_dtype="fp16", recipe="auto", calibrator="entropy")
    after = RECIPES["adaptive"].applied_to(before)
    assert (after.min_sqnr_db, after.float_dtype, after.recipe) == (3, "fp16", None)
    assert {name: getattr(after, name) for name in RECIPE_DEFAULTS} == asdict(RECIPES["adaptive"]) | {
        "calibrator": "entropy"
    }
    plain = RECIPES["adaptive"].applied_to(Int8())
    assert {name: getattr(plain, name) for name in RECIPE_DEFAULTS} == asdict(RECIPES["adaptive"])


def test_every_recipe_makes_valid_settings_and_no_two_are_alike():
    made = [recipe.applied_to(Int8()) for recipe in RECIPES.values()]
    assert len(set(made)) == len(RECIPES)


def test_an_unknown_recipe_is_told_with_its_neighbours():
    with pytest.raises(SpecError, match=r"unknown recipe 'adaptiv'\. Did you mean 'adaptive'"):
        with_recipe(Int8(recipe="adaptiv"), "resnet")


def test_a_family_has_its_own_recipe():
    assert Int8().recipe == Int8(min_sqnr_db=3, reduce_range=True).recipe == "family"
    for family, name in FAMILY_RECIPES.items():
        assert with_recipe(Int8(), family) == RECIPES[name].applied_to(Int8())
        assert RECIPES[name] != next(iter(RECIPES.values()))
    assert with_recipe(Int8(), "of a user") == RECIPES["fast"].applied_to(Int8()) == Int8(recipe=None).filled()
    assert with_recipe(Int8(recipe=None), "vit") == Int8(recipe=None).filled()
    assert set(FAMILY_RECIPES) <= {backbone_class(name).family for name in backbone_names()}


@pytest.mark.parametrize("by_hand", [{"calibrator": "entropy"}, {"equalization": None}, {"bias_correction": None}])
@pytest.mark.parametrize("recipe", ["family", "plain"])
def test_settings_given_by_hand_override_the_recipe_and_the_others_come_from_it(recipe, by_hand):
    settings = Int8(recipe=recipe, **by_hand)
    assert settings.recipe == recipe
    of_recipe = RECIPES[FAMILY_RECIPES["vit"] if recipe == "family" else recipe].applied_to(Int8())
    assert with_recipe(settings, "vit") == replace(of_recipe, **by_hand)


def test_a_setting_that_is_named_overrides_the_recipe_also_where_it_has_its_defaults_value():
    assert parse_precision("int8").recipe == parse_precision("int8", {"min_sqnr_db": 3}).recipe == "family"
    named, plain = (with_recipe(parse_precision("int8", given), "vit") for given in ({"calibrator": "mse"}, {}))
    assert (named.calibrator, named.rounding) == ("mse", "adaptive")
    assert (plain.calibrator, plain.rounding) == ("minmax", "adaptive")


def test_the_settings_of_a_recipe_are_those_that_are_unset_until_it_fills_them():
    assert {field.name for field in dataclasses.fields(Int8) if field.default is UNSET} == set(RECIPE_DEFAULTS)
    assert asdict(next(iter(RECIPES.values()))) == asdict(Recipe()) == RECIPE_DEFAULTS
    assert {name: getattr(Int8().filled(), name) for name in RECIPE_DEFAULTS} == RECIPE_DEFAULTS


def test_the_page_shows_the_table_as_it_is():
    page = (Path(__file__).parents[2] / "docs" / "quantization.md").read_text(encoding="utf-8")
    for name, recipe in RECIPES.items():
        parts = (recipe.calibrator, recipe.equalization or "none", recipe.rounding, recipe.weight_scales)
        row = f"| {' | '.join(map(str, (*parts, recipe.bias_correction or 'none')))} |"
        assert any(line.startswith(f"| `{name}`") and line.endswith(row) for line in page.splitlines()), row


def test_settings_have_the_name_of_their_recipe():
    for name, recipe in RECIPES.items():
        assert recipe_of(recipe.applied_to(Int8())) == name
    assert recipe_of(Int8(calibrator="entropy").filled()) is None
