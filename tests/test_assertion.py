"""``assert_parity``: in a test of one's own, on anything that gives outputs for images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from deploykit import load_bundle
from deploykit.assertion import assert_parity, compare_models, failure_text
from deploykit.errors import ParityError, SpecError

BUNDLE = Path(__file__).parent / "data" / "bundles-0.1.0" / "onnxruntime-int8"
IMAGES = np.random.default_rng(0).standard_normal((3, 3, 8, 8)).astype(np.float32)


def features(images):
    return {"stage1": images * 2, "stage2": images[:, :, ::2, ::2] + 1}


def noisy(scale):
    def run(images):
        noise = np.random.default_rng(1).standard_normal(images.shape).astype(np.float32)
        return features(images) | {"stage1": images * 2 + scale * noise}

    return run


def test_equal_models_pass_and_the_report_comes_back():
    report = assert_parity(features, features, IMAGES)
    assert report.passed
    assert [level.sqnr_db for level in report.levels] == [300.0, 300.0]


def test_a_failure_is_the_table_and_names_the_level():
    with pytest.raises(ParityError) as caught:
        assert_parity(noisy(0.2), features, IMAGES, min_sqnr=30)
    assert "stage1: 2" in str(caught.value)
    assert "│ stage1 │" in str(caught.value)
    assert "FAIL" in str(caught.value)


def test_a_level_may_have_a_budget_of_its_own():
    assert_parity(noisy(0.2), features, IMAGES, min_sqnr=30, per_level={"stage1": 15})
    report = compare_models(noisy(0.2), features, IMAGES, min_sqnr=10, per_level={"stage1": 30})
    assert [level.passed for level in report.levels] == [False, True]
    assert "its own budget is at least 30 dB" in report.levels[0].faults[0]
    with pytest.raises(SpecError, match="Did you mean 'stage1'"):
        assert_parity(features, features, IMAGES, per_level={"stage_1": 15})


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda images: features(images) | {"stage1": np.full_like(images, np.nan)}, "NaN or infinite"),
        (lambda images: features(images) | {"stage1": np.zeros_like(images)}, "every value is 0"),
        (lambda images: features(np.repeat(images[:1], 3, axis=0)), "the same answer"),
        (lambda images: {"stage1": images * 2}, "lacks stage2"),
        (lambda images: features(images) | {"stage1": images[:, :2]}, "shape"),
    ],
)
def test_what_is_wrong_fails_at_any_budget(wrong, says):
    with pytest.raises(ParityError, match=says):
        assert_parity(wrong, features, IMAGES, min_sqnr=-300)


def test_a_torch_module_is_called_with_tensors_in_eval_mode():
    module = torch.nn.Conv2d(3, 4, 3)
    with pytest.raises(SpecError, match=r"call \.eval\(\) first"):
        assert_parity(module, module, IMAGES)
    module.eval()
    expected = module(torch.tensor(IMAGES)).detach().numpy()
    assert_parity(module, lambda images: expected, IMAGES, min_sqnr=100)
    assert_parity({"logits": expected}, expected_only(expected), IMAGES)


def expected_only(values):
    return lambda images: values


def test_top1_agreement_is_a_gate_where_there_are_classes():
    logits = np.eye(3, dtype=np.float32) + 1
    other = np.eye(3, dtype=np.float32)[[0, 1, 1]] + 1
    report = compare_models({"logits": other}, {"logits": logits}, IMAGES, min_sqnr=-10, min_top1_agreement=0.9)
    assert report.levels[0].top1_agreement == pytest.approx(2 / 3)
    assert not report.passed
    with pytest.raises(SpecError, match="needs 'logits'"):
        assert_parity(features, features, IMAGES, min_top1_agreement=0.9)


def test_a_bundle_is_opened_and_its_budget_is_the_default():
    with load_bundle(BUNDLE) as model:
        images = np.random.default_rng(2).standard_normal((3, *model.input_spec.shape[1:])).astype(np.float32)
        report = compare_models(BUNDLE, model, images)
    assert report.min_sqnr_db == model.precision.min_sqnr_db
    assert {level.sqnr_db for level in report.levels} == {300.0}


@pytest.mark.parametrize("wrong", [3, lambda images: np.float32(1), lambda images: images[:1], dict])
def test_what_is_no_model_is_refused(wrong):
    with pytest.raises(SpecError, match="expected"):
        assert_parity(wrong if wrong is not dict else {}, features, IMAGES)


def test_outputs_without_names_are_told_apart_by_their_places():
    def pair(images):
        return images * 2, images[:, :, ::2, ::2]

    def other(images):
        return [images * 2, images[:, :, ::2, ::2] * 1.5]

    report = compare_models(other, pair, IMAGES)
    assert [level.passed for level in report.levels] == [True, False]
    first, second = (level.name for level in report.levels)
    assert second in failure_text(report)
    assert f"{first}:" not in failure_text(report)


def test_the_text_of_a_report_that_passed_is_its_table():
    text = failure_text(compare_models(features, features, IMAGES))
    assert "│ stage1 │" in text
    assert "FAIL" not in text


def test_a_budget_without_an_end_is_refused():
    with pytest.raises(SpecError, match=r"per_level has inf for 'stage1'; expected a finite number of dB"):
        compare_models(features, features, IMAGES, per_level={"stage1": float("inf")})


def test_what_cannot_be_called_is_named():
    with pytest.raises(SpecError, match=r"a float is no model; expected one, a function, outputs, or a folder"):
        compare_models(features, 3.0, IMAGES)
