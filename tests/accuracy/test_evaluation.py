"""Accuracy of engines on labelled images, against counts that are made here by hand."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from PIL import Image

import deploykit
from deploykit.accuracy.answers import subject_of
from deploykit.accuracy.evaluation import evaluate_models
from deploykit.accuracy.intervals import mcnemar, wilson
from deploykit.errors import SpecError
from tests.accuracy.small_classifier import CLASSES, IMAGES, NAMES, export, pixels, small_classifier


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles")
    return {
        "fp32": export(folder / "fp32", labels=NAMES),
        "fp16": export(folder / "fp16", precision="fp16", labels=NAMES),
        "features": export(folder / "features", classes=0),
    }


def logits_of(bundle):
    with deploykit.load_bundle(bundle) as engine:
        return np.concatenate([engine(deploykit.preprocess(image, engine.input_spec)) for image in pixels()])


@pytest.fixture(scope="module")
def logits(bundles):
    return logits_of(bundles["fp32"])


@pytest.fixture(scope="module")
def truth(logits):
    """The engine's own classes, a fifth of them changed."""
    generator = np.random.default_rng(5)
    own = logits.argmax(1)
    return np.where(generator.random(IMAGES) < 0.2, generator.integers(0, CLASSES, IMAGES), own)


def test_shares_are_those_counted_by_hand(bundles, logits, truth):
    found = deploykit.evaluate(bundles["fp32"], (pixels(), truth))
    right = logits.argmax(1) == truth
    order = np.argsort(-logits, axis=1)[:, :5]
    assert 0.5 < right.mean() < 1
    assert found.top1 == right.mean() == float(found)
    assert found.top1_interval == wilson(int(right.sum()), IMAGES)
    assert found.top5 == (order == truth[:, None]).any(1).mean()
    assert (found.images, found.skipped, found.by, found.drop) == (IMAGES, 0, "logits", None)
    assert sum(score.images for score in found.classes) == IMAGES
    for score in found.classes:
        mine = truth == score.index
        assert (score.label, score.images, score.right) == (NAMES[score.index], mine.sum(), right[mine].sum())
    assert found.images_per_s > 0


def test_a_drop_is_paired_image_by_image(bundles, logits, truth):
    module, shape = small_classifier()
    module[-1].bias.data[0] += 1.0  # another model: too many answers are the first class
    other = deploykit.create_backbone(module, **shape)
    found = deploykit.evaluate(other, (pixels(), truth), against=bundles["fp32"])
    answers = other(deploykit.preprocess(list(pixels()), other.input_spec)).argmax(1)
    before, after = logits.argmax(1) == truth, answers == truth
    lost, won = int((before & ~after).sum()), int((after & ~before).sum())
    assert lost > won
    assert (found.drop.lost, found.drop.won) == (lost, won)
    assert found.drop.points == pytest.approx(100 * (before.mean() - after.mean()))
    assert found.drop.p_value == mcnemar(lost, won)
    assert found.drop.agreement == (answers == logits.argmax(1)).mean()
    worst = found.classes[0]
    assert worst.lost == worst.reference_right - worst.right > 0


def test_several_models_are_compared_with_the_first(bundles, truth):
    first, second = evaluate_models([bundles["fp32"], bundles["fp16"]], (pixels(), truth))
    assert first.drop is None
    assert (second.model, second.precision, second.drop.reference) == ("fp16", "fp16", "fp32")
    assert abs(second.drop.points) < 5


def test_without_labels_classes_and_neighbours_are_compared(bundles):
    found = deploykit.evaluate(bundles["fp16"], pixels(), against=bundles["fp32"])
    assert (found.top1, found.classes) == (None, ())
    assert found.drop.agreement > 0.9
    assert 0.8 < found.drop.neighbours <= 1
    assert found.drop.p_value is None
    assert float(found) == found.drop.agreement


def test_features_are_judged_by_their_neighbours(bundles, truth):
    module, shape = small_classifier(0)
    found = deploykit.evaluate(
        bundles["features"], (pixels(), truth), against=deploykit.create_backbone(module, **shape)
    )
    assert found.by == "neighbours"
    assert 1 / CLASSES < found.top1 < 1
    assert found.drop.points == 0
    assert found.drop.neighbours > 0.99
    alone = deploykit.evaluate(bundles["features"], pixels(), against=bundles["features"])
    assert (alone.top1, alone.drop.neighbours, alone.drop.agreement) == (None, 1.0, None)


def test_it_is_a_metric_of_the_search(bundles, truth):
    metric = functools.partial(deploykit.evaluate, images=(pixels(), truth))
    with deploykit.load_bundle(bundles["fp32"]) as engine:
        assert float(metric(engine)) == metric(engine).top1


def test_labels_are_found_by_the_bundles_class_names(bundles, logits, truth, tmp_path):
    for index, (image, label) in enumerate(zip(pixels(), truth, strict=True)):
        folder = tmp_path / "set" / NAMES[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{index:03}.png")
    assert deploykit.evaluate(bundles["fp32"], tmp_path / "set").top1 == (logits.argmax(1) == truth).mean()


def test_a_broken_image_is_left_out_on_request(bundles, tmp_path):
    for index, name in enumerate(NAMES):
        (tmp_path / name).mkdir()
        Image.fromarray(pixels()[index]).save(tmp_path / name / "a.png")
    (tmp_path / "ant" / "b.png").write_bytes(b"nothing")
    with pytest.raises(deploykit.ImageError, match=r"b\.png"):
        deploykit.evaluate(bundles["fp32"], tmp_path)
    with pytest.warns(UserWarning, match=r"left out: .*b\.png"):
        found = deploykit.evaluate(bundles["fp32"], tmp_path, skip_corrupt=True)
    assert (found.images, found.skipped) == (len(NAMES), 1)


def test_what_cannot_be_compared_is_refused(bundles, truth):
    with pytest.raises(SpecError, match="no model to compare with"):
        deploykit.evaluate(bundles["fp32"], pixels())
    with pytest.raises(SpecError, match="cannot be compared"):
        deploykit.evaluate(bundles["fp32"], (pixels(), truth), against=bundles["features"])
    with pytest.raises(SpecError, match="is no bundle"):
        deploykit.evaluate("nowhere", (pixels(), truth))
    with pytest.raises(SpecError, match="stand for no class: 99"):
        deploykit.evaluate(bundles["fp32"], (pixels(), np.full(IMAGES, 99)))


def test_labels_that_are_given_decide_also_where_the_images_have_numbers(bundles, logits):
    own, order = logits.argmax(1), [*range(1, CLASSES), 0]
    shifted = np.array([order[index] for index in own])  # what the outputs 0, 1, 2 stand for: 1, 2, 3
    found = evaluate_models([bundles["fp32"]], (pixels(), shifted), labels=[str(each) for each in order])
    assert found[0].top1 == 1.0
    with pytest.raises(SpecError, match="2 labels and the classifier has"):
        evaluate_models([bundles["fp32"]], (pixels(), shifted), labels=["0", "1"])


def test_models_of_other_class_names_are_not_compared(bundles, truth, tmp_path):
    other = export(tmp_path / "other", labels=list(reversed(NAMES)))
    with pytest.raises(SpecError, match=r"the class names of .* and of other, or their order, differ"):
        evaluate_models([bundles["fp32"], other], (pixels(), truth))


def test_what_is_no_model_and_images_of_which_none_is_read_are_refused(bundles, tmp_path):
    with pytest.raises(SpecError, match=r"the model is a dict; expected a bundle's folder, an engine, or what create"):
        subject_of({})
    (tmp_path / "ant").mkdir()
    (tmp_path / "ant" / "a.png").write_bytes(b"nothing")
    with (
        pytest.warns(UserWarning, match=r"left out: .*a\.png"),
        pytest.raises(deploykit.ImageError, match=r"none of the 1 images of .* could be read"),
    ):
        deploykit.evaluate(bundles["fp32"], tmp_path, skip_corrupt=True)


def test_a_model_that_gives_no_numbers_is_named():
    module, shape = small_classifier()
    module[-1].bias.data[:] = float("nan")
    model = deploykit.create_backbone(module, **shape)
    with pytest.raises(deploykit.DeployKitError, match=r"gave NaN or infinity\. Fix: run deploykit verify"):
        deploykit.evaluate(model, (pixels(), np.zeros(IMAGES, int)))


def test_classes_without_names_are_called_by_their_folders_or_their_number(tmp_path):
    module, shape = small_classifier()
    model = deploykit.create_backbone(module, **shape)
    found = deploykit.evaluate(model, (pixels(), np.arange(IMAGES) % CLASSES))
    assert {score.label for score in found.classes} == {f"class {index}" for index in range(CLASSES)}
    for name, picture in zip(NAMES, pixels(), strict=False):
        (tmp_path / name).mkdir()
        Image.fromarray(picture).save(tmp_path / name / "a.png")
    assert {score.label for score in deploykit.evaluate(model, tmp_path).classes} == set(NAMES)
