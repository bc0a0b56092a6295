"""What two bundles may differ by when nobody said."""

from __future__ import annotations

import dataclasses

import pytest

from deploykit.bundle_files import PLAN_FILE
from deploykit.changes.differences import contract_differences, making_differences
from deploykit.changes.plans import plan_differences, read_plan
from deploykit.changes.rows import Between, Gates, LevelChange, _judged
from deploykit.changes.tolerances import DROP_DB, Tolerances, expected_between
from deploykit.errors import BundleError, SpecError
from deploykit.manifest import FileRecord, Manifest
from deploykit.parity.interval import wilson
from deploykit.spec import BackboneSpec, FeatureLevel, InputSpec, TensorSpec

LEVEL = FeatureLevel(name="stage1", index=1, channels=8, stride=4, receptive_field=9)
INPUT = InputSpec(name="images", batch=1, channels=3, height=32, width=32)


@pytest.fixture
def manifest() -> Manifest:
    backbone = BackboneSpec(
        name="resnet18", family="resnet", levels=(LEVEL,), features_only=False, num_classes=10, image_size=(32, 32)
    )
    return Manifest(
        backbone=backbone,
        input=INPUT,
        outputs=(TensorSpec(name="logits", shape=(1, 10)),),
        runtime="onnxruntime",
        runtime_version="1.32.0",
        precision="fp32",
        engine="model.onnx",
        weights_digest="a" * 64,
    )


def _named(differences) -> list[str]:
    return [each.what for each in differences]


@pytest.mark.parametrize(
    ("old", "new", "same_plan", "expected"),
    [
        ({}, {}, False, 60.0),
        ({}, {"runtime": "openvino"}, False, 60.0),
        ({}, {"precision": "fp16"}, False, 40.0),
        ({}, {"precision": "bf16"}, False, None),
        ({}, {"weights_digest": "b" * 64}, False, None),
        ({}, {"precision": "int8"}, False, None),
        ({"precision": "int8"}, {"precision": "int8"}, False, None),
        ({"precision": "int8"}, {"precision": "int8"}, True, 40.0),
        ({"precision": "int8"}, {"precision": "int8", "runtime_version": "2"}, True, 30.0),
        ({"precision": "int8"}, {"precision": "int8", "runtime": "openvino"}, True, None),
    ],
)
def test_how_near_two_engines_must_be(manifest, old, new, same_plan, expected):
    pair = dataclasses.replace(manifest, **old), dataclasses.replace(manifest, **new)
    assert expected_between(*pair, same_plan=same_plan) == expected


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_drop_db": -1.0},
        {"max_drop_db": float("nan")},
        {"min_sqnr_db": float("inf")},
        {"min_top1_agreement": 1.5},
        {"max_slowdown": 0.0},
        {"max_growth": float("nan")},
        {"allow": ("lables",)},
    ],
)
def test_a_tolerance_out_of_range_is_refused(wrong):
    with pytest.raises(SpecError):
        Tolerances(**wrong)


def test_an_unknown_part_gets_the_nearest(manifest):
    with pytest.raises(SpecError, match="Did you mean 'labels'"):
        Tolerances(allow=("lables",))


def test_equal_manifests_differ_in_nothing(manifest):
    assert not [*contract_differences(manifest, manifest, (None, None)), *making_differences(manifest, manifest)]


def test_every_part_of_the_contract_is_compared(manifest):
    changed = {
        "outputs": {"outputs": (TensorSpec(name="logits", shape=(1, 11)),)},
        "input": {"input": dataclasses.replace(INPUT, height=64)},
        "preprocessing": {
            "input": dataclasses.replace(
                INPUT, preprocessing=dataclasses.replace(INPUT.preprocessing, interpolation="bilinear")
            )
        },
        "levels": {"backbone": dataclasses.replace(manifest.backbone, levels=(dataclasses.replace(LEVEL, stride=8),))},
        "weights": {"weights_digest": "b" * 64},
    }
    for part, values in changed.items():
        found = list(contract_differences(manifest, dataclasses.replace(manifest, **values), (None, None)))
        assert [each.contract for each in found] == [part], part
    labels = list(contract_differences(manifest, manifest, (("cat", "dog"), ("cat", "wolf"))))
    assert [(each.contract, each.old, each.new) for each in labels] == [("labels", "1 dog", "1 wolf")]


def test_two_outputs_in_another_order_are_a_change(manifest):
    pair = (TensorSpec(name="a", shape=(1, 2)), TensorSpec(name="b", shape=(1, 2)))
    old, new = (dataclasses.replace(manifest, outputs=outputs) for outputs in (pair, pair[::-1]))
    assert _named(contract_differences(old, new, (None, None))) == ["order of the outputs"]


def test_passes_that_found_nothing_are_no_difference(manifest):
    old, new = (dataclasses.replace(manifest, fusions=each) for each in ({"a": 0, "b": 3}, {"b": 4}))
    assert [(each.what, each.old, each.new) for each in making_differences(old, new)] == [("fusion b", "3", "4")]


def _plan(**changes):
    plan = {
        "calibrator": "mse",
        "images": 16,
        "placement": {"weights": {"conv1": {}, "conv2": {}}, "float_nodes": {}},
        "ranges": {"relu": {"low": 0.0, "high": 1.0}, "add": {"low": -1.0, "high": 1.0}},
    }
    return plan | changes


def test_what_a_plan_does_differently_is_named():
    moved = {"relu": {"low": 0.0, "high": 2.0}, "add": {"low": -1.0, "high": 1.02}}
    fewer = {"weights": {"conv1": {}}, "float_nodes": {"conv2": "costs 3 dB"}}
    found = list(plan_differences(_plan(), _plan(images=64, placement=fewer, ranges=moved)))
    assert _named(found) == ["plan images", "nodes in integers", "nodes in float", "1 of 2 activation ranges"]
    assert found[1].old == "2, only here conv2"
    assert found[3].new == "relu 0 to 2"


def test_a_plan_beside_none_is_a_difference():
    assert _named(plan_differences(None, _plan())) == ["quantization plan"]
    assert not list(plan_differences(_plan(), _plan()))


def test_a_drop_that_was_given_stands_and_without_it_precisions_must_be_equal(manifest):
    lower = dataclasses.replace(manifest, precision="int8")
    assert Tolerances(max_drop_db=0.0).allowed_drop(manifest, lower) == 0
    assert Tolerances().allowed_drop(manifest, lower) is None
    assert Tolerances().allowed_drop(manifest, manifest) == DROP_DB


GATES = Gates(drop_db=2.0, budget_db=20.0, between_db=None, agreement=None)


@pytest.mark.parametrize(
    ("old_db", "new_db", "failures", "notes"),
    [
        (40.0, 39.5, (), ()),
        (40.0, 38.5, (), ("1.5 dB farther from torch, near the 2 dB that are allowed",)),
        (40.0, 37.5, ("2.5 dB farther from torch; allowed 2",), ()),
        (20.5, 20.3, (), ("20.3 dB from torch, near its budget of 20 dB",)),
        (20.5, 19.9, ("19.9 dB from torch; its own budget is 20 dB",), ()),
    ],
)
def test_what_is_outside_fails_and_what_is_near_is_noted(old_db, new_db, failures, notes):
    found = _judged(LevelChange(name="stage4", old_db=old_db, new_db=new_db, measured="here"), None, GATES)
    assert (found.failures, found.notes) == (failures, notes)


def test_too_few_images_of_the_same_class_fail():
    between = Between(sqnr_db=30.0, agreement=wilson(6, 10), fault=None)
    change = LevelChange(name="logits", old_db=40.0, new_db=40.0, measured="here")
    (failure,) = _judged(change, between, dataclasses.replace(GATES, agreement=0.9)).failures
    assert failure.startswith("the same class as before on 60")
    assert failure.endswith("of the images; expected at least 90.0%")
    assert _judged(change, between, dataclasses.replace(GATES, agreement=0.6)).failures == ()


@pytest.mark.parametrize("text", ["[1]", "{}", '{"placement": {"weights": {}}, "ranges": {}}', "no JSON"])
def test_a_file_that_is_no_plan_is_refused(manifest, tmp_path, text):
    (tmp_path / PLAN_FILE).write_text(text)
    assert read_plan(tmp_path, manifest) is None, "the manifest names none"
    named = dataclasses.replace(manifest, files={PLAN_FILE: FileRecord(size=1, sha256="0" * 64)})
    with pytest.raises(BundleError, match=rf"{PLAN_FILE} is not a quantization plan .*Export the bundle again"):
        read_plan(tmp_path, named)
