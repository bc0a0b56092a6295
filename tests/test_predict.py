"""Classes and probabilities of images, the same in every runtime."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import deploykit
from deploykit.bundle import write_manifest
from deploykit.errors import BundleError, DeployKitError, SpecError
from deploykit.labels import LABELS_FILE
from deploykit.predict import Prediction, predict, top_classes
from deploykit.spec import BatchRange, InputSpec
from tests.conftest_graphs import RAN_HERE, SIDE, SLOW_TO_BUILD, engine_of, network, open_engine, spec_of
from tests.small_resnet import SMALL

NAMES = tuple(f"name {number}" for number in range(10))
PIXELS = np.random.default_rng(0).integers(0, 256, (7, 40, 50, 3), np.uint8)


def softmax(logits: np.ndarray) -> np.ndarray:
    shares = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    return shares / shares.sum(1, keepdims=True)


def expected(images: list[np.ndarray]) -> np.ndarray:
    """The probabilities that the torch module gives for images, ``(N, 10)``."""
    batch = deploykit.preprocess(images, InputSpec(height=SIDE, width=SIDE))
    with torch.no_grad():
        (logits,) = network(features_only=False)(torch.from_numpy(batch))
    return softmax(logits.numpy())


ENGINES = [
    *(pytest.param((name, False), marks=[pytest.mark.slow] * (name in SLOW_TO_BUILD)) for name in RAN_HERE),
    ("onnxruntime", True),
]


@pytest.fixture(params=ENGINES, ids=str)
def engine(request, tmp_path):
    """A classifier of ten named classes in each runtime, of a dynamic batch and of one image."""
    runtime, dynamic = request.param
    batch = {} if dynamic else {"dynamic": False}  # as other tests say it, which share the engines
    manifest, folder = engine_of(runtime, features_only=False, **batch)
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / LABELS_FILE).write_text("\n".join(NAMES) + "\n", encoding="utf-8")
    with open_engine(manifest, tmp_path) as model:
        yield model


def test_an_engine_names_the_classes_of_one_image_and_of_several(engine):
    images = list(PIXELS)
    probabilities = expected(images)
    found = engine.predict(images, top=3)
    assert engine.labels == NAMES
    assert [len(each) for each in found] == [3] * 7
    for own, row in zip(found, probabilities, strict=True):
        assert [each.index for each in own] == list(np.argsort(-row)[:3])
        assert [each.label for each in own] == [NAMES[each.index] for each in own]
        np.testing.assert_allclose([each.probability for each in own], np.sort(row)[::-1][:3], rtol=1e-4)
    single = engine.predict(images[0], top=3)
    assert isinstance(single[0], Prediction)
    assert [each.index for each in single] == [each.index for each in found[0]]
    assert len(engine.predict([images[0]])) == 1
    assert len(engine.predict(images[0], top=99)) == 10
    assert sum(each.probability for each in engine.predict(images[0], top=10)) == pytest.approx(1)


def test_what_is_no_image_is_a_wrong_input_of_an_engine(engine):
    for wrong in (
        None,
        3,
        np.zeros((1, 3, SIDE, SIDE), np.float32),
        torch.zeros(1, 3, SIDE, SIDE),
        b"junk",
        "gone.jpg",
    ):
        with pytest.raises(SpecError):
            engine.predict(wrong)
    for top in (0, -1, 2.5, "five", True, None):
        with pytest.raises(SpecError, match="top is"):
            engine.predict(PIXELS[0], top=top)
    engine.close()
    with pytest.raises(SpecError, match="closed"):
        engine.predict(PIXELS[0])


def test_an_engine_without_names_numbers_its_classes():
    manifest, folder = engine_of("onnxruntime", features_only=False)
    with open_engine(manifest, folder) as model:
        assert model.labels is None
        assert all(each.label == f"class {each.index}" for each in model.predict(PIXELS[0]))


def test_features_have_no_classes():
    manifest, folder = engine_of("onnxruntime")
    with (
        open_engine(manifest, folder) as model,
        pytest.raises(SpecError, match="tiny gives stem, stage1, and no logits"),
    ):
        model.predict(PIXELS[0])
    backbone = deploykit.create_backbone("resnet18", num_classes=0, image_size=64)
    with pytest.raises(SpecError, match="resnet18 gives embedding"):
        backbone.predict(PIXELS[0])


@pytest.mark.parametrize("content", ["a\nb\n", "\n".join([*NAMES, "more"]), b"\xff\xfe"], ids=["few", "many", "bytes"])
def test_names_that_are_not_one_for_each_class_are_a_damaged_bundle(content, tmp_path):
    manifest, folder = engine_of("onnxruntime", features_only=False)
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / LABELS_FILE).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BundleError, match=r"labels\.txt"):
        open_engine(manifest, tmp_path)


def test_names_may_hold_any_separator_but_a_line_feed(tmp_path):
    manifest, folder = engine_of("onnxruntime", features_only=False)
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    names = ("naïve", "a\u2028b", "c\x0bd", *NAMES[3:])
    (tmp_path / LABELS_FILE).write_text("\n".join(names), encoding="utf-8")
    with open_engine(manifest, tmp_path) as model:
        assert model.labels == names


@pytest.mark.parametrize(("precision", "embed"), [("fp32", False), ("fp32", True)], ids=str)
def test_torch_names_classes_as_its_logits_do(embed, precision):
    torch.manual_seed(0)
    model = deploykit.create_backbone(
        SMALL, num_classes=3, image_size=64, labels=["x", "y", "z"], embed_preprocessing=embed, precision=precision
    )
    assert model.labels == ("x", "y", "z")
    found = model.predict(list(PIXELS), top=2)
    logits = model(deploykit.preprocess(list(PIXELS), model.input_spec))
    for own, row in zip(found, softmax(logits), strict=True):
        assert [each.label for each in own] == ["xyz"[index] for index in np.argsort(-row)[:2]]
        np.testing.assert_allclose([each.probability for each in own], np.sort(row)[::-1][:2], rtol=1e-3)
    assert [each.label for each in model.predict(PIXELS[0])] == ["xyz"[index] for index in np.argsort(-logits[0])]


def test_a_module_of_the_users_own_names_its_classes():
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    model = deploykit.create_backbone(module, image_size=32, labels={"cat": 0, "dog": 1, "emu": 2, "fox": 3})
    assert {each.label for each in model.predict(PIXELS[0])} == {"cat", "dog", "emu", "fox"}


class Constant:
    """A model that gives its logits for whatever it is called with, and notes the sizes of its batches."""

    def __init__(self, batch: int | BatchRange) -> None:
        self.input_spec = InputSpec(batch=batch, height=8, width=8)
        self.labels = None
        self.called: list[int] = []

    def __call__(self, images: np.ndarray) -> np.ndarray:
        self.called.append(len(images))
        return images.reshape(len(images), -1)[:, :10]


@pytest.mark.parametrize(
    ("batch", "called"),
    [
        (1, [1] * 7),
        (2, [2] * 4),
        (16, [16]),
        (BatchRange(min=1, opt=1, max=3), [3, 3, 1]),
        (BatchRange(min=5, opt=5, max=6), [5, 5]),
        (BatchRange(max=2**31 - 1), [4, 3]),
    ],
    ids=str,
)
def test_images_run_in_batches_that_the_model_takes(batch, called):
    model = Constant(batch)
    found = predict(model, spec_of(features_only=False), list(PIXELS), 10)
    assert model.called == called
    images = deploykit.preprocess(list(PIXELS), model.input_spec)
    assert [own[0].index for own in found] == list(images.reshape(7, -1)[:, :10].argmax(1))


# ---- probabilities


@settings(max_examples=100, deadline=None)
@given(
    hnp.arrays(np.float32, st.integers(1, 30), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)),
    st.integers(1, 40),
)
def test_probabilities_are_finite_ordered_and_sum_to_one(logits, count):
    found = top_classes(logits, None, count)
    assert len(found) == min(count, len(logits))
    values = [logits[each.index] for each in found]
    assert values == sorted(values, reverse=True)
    assert all(0 <= each.probability <= 1 for each in found)
    assert sum(each.probability for each in top_classes(logits, None, len(logits))) == pytest.approx(1)


def test_a_shift_of_all_logits_changes_nothing():
    logits = np.array([0.0, 1.0, 2.0], np.float32)
    for shift in (-5000, 5000):
        shares = [each.probability for each in top_classes(logits + np.float32(shift), None, 3)]
        np.testing.assert_allclose(shares, [each.probability for each in top_classes(logits, None, 3)])


def test_a_class_ruled_out_has_probability_0():
    found = top_classes(np.array([1.0, -np.inf, 1.0], np.float32), ("a", "b", "c"), 3)
    assert [(each.label, each.probability) for each in found] == [("a", 0.5), ("c", 0.5), ("b", 0.0)]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_without_probabilities_are_refused(bad):
    with pytest.raises(DeployKitError, match="logits hold NaN or infinity"):
        top_classes(np.array([1.0, bad], np.float32), None, 1)
    with pytest.raises(DeployKitError, match="logits hold NaN or infinity"):
        top_classes(np.array([-np.inf, -np.inf], np.float32), None, 1)


# ---- without torch


def test_a_bundle_predicts_without_torch(tmp_path):
    manifest, folder = engine_of("onnxruntime", features_only=False)
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    for path in folder.iterdir():
        (bundle / path.name).write_bytes(path.read_bytes())
    (bundle / LABELS_FILE).write_text("\n".join(NAMES) + "\n", encoding="utf-8")
    write_manifest(bundle, manifest)
    code = f"""
        import sys
        sys.modules["torch"] = sys.modules["onnx"] = None
        import numpy as np, deploykit
        with deploykit.load_bundle({str(bundle)!r}) as model:
            (best,) = model.predict(np.zeros((40, 50, 3), np.uint8), top=1)
            print(best.label, model.labels[best.index])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    first, second = done.stdout.strip().split("name ")[1:]
    assert first.strip() == second
