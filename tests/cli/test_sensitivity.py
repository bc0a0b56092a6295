from __future__ import annotations

import math

import pytest

from tests.small_resnet import SMALL

WORDS = ("sensitivity", SMALL, "--image-size", "64")


@pytest.fixture(scope="module")
def told(call, photos):
    done = call(*WORDS, "--calibration", photos, "--json")
    assert done.code == 0, done.err
    return done


def test_every_layer_has_a_figure_for_every_level(told):
    found = told.json()["sensitivity"]
    assert len(found["nodes"]) == 14
    assert {"conv1", "layer1.0.conv1", "fc"} < {entry["layer"] for entry in found["nodes"]}
    for entry in found["nodes"]:
        assert list(entry["sqnr_db"]) == ["stem", "stage1", "stage2", "stage3", "stage4", "logits"]
    assert sum(told.json()["shares"].values()) == pytest.approx(1)


def test_noise_of_weights_is_told_from_that_of_activations(told):
    found = told.json()["sensitivity"]
    for entry in found["nodes"]:
        worst = min(entry["sqnr_db"].values())
        if worst > 100:
            continue
        apart = -10 * math.log10(sum(10 ** (-entry[part] / 10) for part in ("weights_db", "activations_db")))
        assert apart == pytest.approx(worst, abs=2)  # the two noises hardly know of each other
    assert min(found["together_db"].values()) < min(found["weights_db"].values())
    assert min(found["together_db"].values()) < min(found["activations_db"].values())
    assert found["cures"] == []


def test_cures_are_tried_and_ranked(call, photos, told):
    done = call(*WORDS, "--calibration", photos, "--cures", "--json")
    found = done.json()["sensitivity"]
    before = min(found["together_db"].values())
    cures = {each["name"]: each for each in found["cures"]}
    assert {"the noisiest layer in float", "the 8 noisiest layers in float", "wider ranges"} < set(cures)
    assert {"adaptive rounding", "all 4 images instead of 2"} < set(cures)
    for each in found["cures"]:
        if "images" not in each["name"]:
            assert each["worst_db"] - before == pytest.approx(each["gain_db"], abs=0.02)
    gains = [each["gain_db"] for each in found["cures"]]
    assert gains == sorted(gains, reverse=True)
    assert cures["the 8 noisiest layers in float"]["gain_db"] > cures["the noisiest layer in float"]["gain_db"] > 0


@pytest.mark.slow
def test_cures_of_nncfs_recipe_are_nncfs_estimators(call, photos):
    pytest.importorskip("nncf", reason="nncf is not installed")
    done = call(*WORDS, "--calibration", photos, "--recipe", "nncf", "--cures", "--json")
    assert done.code == 0, done.err
    cures = {each["name"] for each in done.json()["sensitivity"]["cures"]}
    assert {"the noisiest layer in float", "wider ranges", "tighter ranges"} < cures
    assert "adaptive rounding" not in cures


def test_few_images_are_warned_of_on_stderr(told):
    assert told.err.count("warning: only 4 different calibration images were given; expected at least 16") == 1


def test_the_table_shows_some_layers_and_sums_up_the_rest(call, photos, told, tmp_path):
    done = call(*WORDS, "--calibration", photos, "--nodes", "3", "--cures", "--plot", tmp_path / "layers.png")
    assert done.code == 0
    assert (tmp_path / "layers.png").stat().st_size > 1000
    layers = {entry["layer"] for entry in told.json()["sensitivity"]["nodes"]}
    rows = [line.split("│")[1].strip() for line in done.out.splitlines() if "Conv" in line or "Gemm" in line]
    assert len(rows) == 3
    assert set(rows) < layers
    assert f"{len(layers) - 3} more" in done.out
    assert "all of them" in done.out
    (cure,) = [line for line in done.out.splitlines() if "the noisiest layer in float" in line]
    assert cure.rstrip(" │").endswith("--mixed-precision")
    assert done.out.splitlines()[-1].startswith("Next: deploykit export " + SMALL)


def test_a_float_runtime_and_missing_images_are_bad_usage(call, photos):
    assert call(*WORDS).code == 2
    unknown = call(*WORDS, "--calibration", photos, "--runtime", "onnxruntim")
    assert unknown.code == 2
    assert "Did you mean 'onnxruntime'" in unknown.err
