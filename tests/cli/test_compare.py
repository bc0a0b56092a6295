"""``deploykit compare``: 0 where a new bundle can replace the old one, 1 where it changes more than is allowed."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from deploykit import Tolerances, compare_bundles
from deploykit.bundle import read_manifest, write_manifest
from deploykit.errors import ParityError, SpecError


@pytest.fixture
def copy(tmp_path, classifier):
    return shutil.copytree(classifier, tmp_path / "copy")


def _rewrite(folder, **values):
    manifest = dataclasses.replace(read_manifest(folder), **values)
    for name in ("manifest.json", "manifest.sha256"):
        (folder / name).unlink()
    write_manifest(folder, manifest)


def _change_weight(folder, change):
    """Plant a fault in the first convolution: of random weights the branches of later blocks end in zeros."""
    model = onnx.load(folder / "model.onnx")
    weights = [each for each in model.graph.initializer if len(each.dims) == 4]
    chosen = weights[0]
    chosen.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(chosen).copy()), chosen.name))
    onnx.save(model, folder / "model.onnx")
    _rewrite(folder)


def _swap_channels(weight):
    weight[[0, 1]] = weight[[1, 0]]
    return weight


def _break(weight):
    weight[0, 0, 0, 0] = np.nan
    return weight


def test_a_bundle_can_replace_itself(call, classifier, tmp_path):
    text = call("compare", classifier, classifier, "-o", tmp_path / "compare.json")
    assert text.code == 0, text.err
    assert f"{classifier} can replace {classifier}" in text.out
    told = json.loads((tmp_path / "compare.json").read_text())
    found = told["comparison"]
    assert (told["passed"], found["contract"], found["making"]) == (True, [], [])
    assert [level["between_db"] for level in found["levels"] if level["measured"] == "here"] == [300.0]
    assert {each["name"] for each in found["measures"]} == {"size", "latency an image"}


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (lambda weight: weight * np.float32(1.01), "from the old outputs; expected at least 60 dB"),
        (lambda weight: -weight, "farther from torch; allowed 1"),
        (_swap_channels, "from the old outputs; expected at least 60 dB"),
        (_break, "values are NaN or infinite"),
    ],
)
def test_a_planted_fault_gives_1(call, classifier, copy, fault, says):
    _change_weight(copy, fault)
    done = call("compare", classifier, copy)
    assert done.code == 1
    assert says in done.out


def test_an_old_engine_of_nan_is_an_error(call, classifier, copy):
    _change_weight(copy, _break)
    done = call("compare", copy, classifier, "--json")
    assert (done.code, done.json()["error"]) == (1, "ParityError")


def test_a_contract_may_change_where_it_is_allowed(call, classifier, copy):
    spec = read_manifest(copy).input
    how = dataclasses.replace(spec.preprocessing, interpolation="bilinear")
    _rewrite(copy, input=dataclasses.replace(spec, preprocessing=how))
    done = call("compare", classifier, copy)
    assert done.code == 1
    assert "preprocessing interpolation: bilinear; it was" in done.out
    assert call("compare", classifier, copy, "--allow", "preprocessing").code == 0


def test_the_labels_are_compared(call, classifier, copy):
    (copy / "labels.txt").write_text("\n".join(f"class {index}" for index in range(1000)) + "\n")
    _rewrite(copy)
    done = call("compare", classifier, copy, "--no-run")
    assert done.code == 1
    assert "labels: 1000 names; it was none" in done.out


def test_image_files_are_prepared_as_each_manifest_says(call, classifier, copy, photos):
    assert call("compare", classifier, copy, "--images", photos, "--min-top1-agreement", "1").code == 0
    spec = read_manifest(copy).input
    how = dataclasses.replace(spec.preprocessing, mean=(0.0, 0.0, 0.0))
    _rewrite(copy, input=dataclasses.replace(spec, preprocessing=how))
    done = call("compare", classifier, copy, "--images", photos, "--allow", "preprocessing")
    assert done.code == 1
    assert "dB from the old outputs" in done.out


def test_size_and_latency_have_limits(classifier, copy):
    found = compare_bundles(classifier, copy, tolerances=Tolerances(max_growth=0.5, max_slowdown=1e-6))
    assert [failure.partition(":")[0] for failure in found.failures] == ["size", "latency an image"]
    with pytest.raises(ParityError, match="times the old one"):
        found.raise_for_failures()


def test_without_running_the_stored_figures_are_compared(features, classifier):
    found = compare_bundles(features, features, run=False)
    assert found.passed
    assert {level.measured for level in found.levels} == {"stored"}
    assert not found.images
    other = compare_bundles(classifier, features, run=False)
    assert {each.contract for each in other.contract} >= {"outputs", "input"}


def test_a_figure_near_its_limit_is_noted(classifier, copy):
    exact = compare_bundles(classifier, copy).levels[-1]
    found = compare_bundles(classifier, copy, tolerances=Tolerances(min_sqnr_db=exact.between_db - 0.5))
    assert found.passed
    assert "near the limit" in found.notes[-1]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--max-drop-db", "-1"), "max_drop_db is -1.0"),
        (("--allow", "lables"), "Did you mean 'labels'"),
        (("--images", "nowhere.jpg"), "no such file"),
    ],
)
def test_bad_usage_gives_2(call, classifier, arguments, says):
    done = call("compare", classifier, classifier, *arguments)
    assert done.code == 2
    assert says in done.err


def test_images_that_nothing_runs_on_are_refused(classifier):
    with pytest.raises(SpecError, match="nothing runs on"):
        compare_bundles(classifier, classifier, images=["a.jpg"], run=False)
    with pytest.raises(SpecError, match="is empty"):
        compare_bundles(classifier, classifier, images=[])


@pytest.mark.parametrize(
    ("tolerance", "name"),
    [
        ({"min_sqnr_db": 60.0}, "min_sqnr_db"),
        ({"min_top1_agreement": 0.9}, "min_top1_agreement"),
        ({"max_slowdown": 1.01}, "max_slowdown"),
    ],
)
def test_a_tolerance_that_nothing_is_measured_for_is_refused(classifier, tolerance, name):
    with pytest.raises(SpecError, match=f"^{name} was given, and these two bundles have nothing"):
        compare_bundles(classifier, classifier, tolerances=Tolerances(**tolerance), run=False)


def test_two_bundles_without_any_figure_never_pass(classifier, tmp_path):
    bare = [shutil.copytree(classifier, tmp_path / name) for name in ("one", "other")]
    for folder in bare:
        (folder / "parity.json").unlink()
        _rewrite(folder)
    found = compare_bundles(*bare, run=False)
    assert found.failures == ("no level was compared: neither bundle stores any",)


def test_an_error_is_told_as_by_every_command(call, classifier, tmp_path):
    told = call("compare", tmp_path / "nothing", classifier, "--json")
    assert told.code == told.json()["exit_code"] == 3
    assert told.json()["error"] == "BundleError"
