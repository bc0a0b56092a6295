"""``deploykit run``: classes or feature figures for image files."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import deploykit
from deploykit.bundle import read_manifest, write_manifest
from deploykit.predict import top_classes

PHOTOGRAPHS = ["astronaut.jpg", "chelsea.jpg", "coffee.jpg", "rocket.jpg"]


def test_a_folder_runs_through_a_static_batch(call, classifier, photos):
    told = call("run", classifier, photos / "rocket.jpg", photos, "--top", "3", "--json").json()
    assert [image["image"] for image in told["images"]] == [str(photos / n) for n in ["rocket.jpg", *PHOTOGRAPHS]]
    assert told["images"][0]["top"] == told["images"][-1]["top"]
    assert (told["runtime"], told["precision"], told["device"]) == ("onnxruntime", "fp32", "cpu")
    for image in told["images"]:
        found = [each["probability"] for each in image["top"]]
        assert len(found) == 3
        assert found == sorted(found, reverse=True)


def test_the_classes_are_those_of_the_engine(call, classifier, photos):
    file = photos / "coffee.jpg"
    with deploykit.load_bundle(classifier) as model:
        images = deploykit.load_images([file, file], model.input_spec)
        logits = model(images)[0].astype(np.float64)
    best = call("run", classifier, file, "--json").json()["images"][0]["top"]
    assert [each["index"] for each in best] == list(np.argsort(-logits)[:5])
    expected = np.exp(logits[best[0]["index"]]) / np.exp(logits).sum()
    assert best[0]["probability"] == pytest.approx(expected, rel=1e-6)


def test_classes_have_the_names_in_the_bundle(call, classifier, photos, tmp_path):
    named = tmp_path / "named"
    shutil.copytree(classifier, named)
    labels = [f"name {number}" for number in range(1000)]
    (named / "labels.txt").write_text("\n".join(labels) + "\n")
    write_manifest(named, read_manifest(named))
    done = call("run", named, photos / "chelsea.jpg", "--json")
    assert all(each["label"] == labels[each["index"]] for each in done.json()["images"][0]["top"])


def test_random_weights_have_no_class_names(classifier):
    assert not (classifier / "labels.txt").exists()


def test_classes_without_names_are_numbered():
    best = top_classes(np.array([0.0, 100.0, 1.0], np.float32), None, 2)
    assert [(each.index, each.label) for each in best] == [(1, "class 1"), (2, "class 2")]
    assert best[0].probability == pytest.approx(1)


def test_features_give_name_shape_mean_and_deviation(call, features, photos):
    text = call("run", features, photos / "coffee.jpg")
    outputs = call("run", features, photos / "coffee.jpg", "--json").json()["images"][0]["outputs"]
    with deploykit.load_bundle(features) as model:
        expected = model(deploykit.load_images(photos / "coffee.jpg", model.input_spec))
    assert [(each["name"], each["shape"]) for each in outputs] == [("stage2", [24, 8, 8]), ("stage3", [32, 4, 4])]
    for each in outputs:
        assert each["mean"] == pytest.approx(float(expected[each["name"]].mean()), rel=1e-4)
        assert each["std"] == pytest.approx(float(expected[each["name"]].std()), rel=1e-4)
    assert "32 x 4 x 4" in text.out
    assert text.out.splitlines()[-1] == f"Next: deploykit verify {features}"


def test_the_crop_mode_changes_what_the_engine_sees(call, classifier, tmp_path):
    wide = np.zeros((64, 256, 3), np.uint8)
    wide[:, 128:] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    tops = {
        mode: call("run", classifier, tmp_path / "wide.png", "--crop-mode", mode, "--json").json()["images"][0]["top"]
        for mode in ("center", "squash", "border")
    }
    assert tops["center"] == call("run", classifier, tmp_path / "wide.png", "--json").json()["images"][0]["top"]
    assert read_manifest(classifier).input.preprocessing.crop_mode == "center"
    assert tops["center"] != tops["squash"] != tops["border"] != tops["center"]


@pytest.fixture
def unreadable(tmp_path, monkeypatch):
    """The current folder, with an empty folder and a file that is no image."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.jpg").write_text("not an image")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("absent.jpg",), "absent.jpg: no such file or folder."),
        (("empty",), "empty: no image files in the folder"),
        (("notes.jpg",), "notes.jpg: not an image"),
        (("notes.jpg", "--top", "0"), "--top is 0"),
        (("notes.jpg", "--crop-mode", "centre"), "Did you mean 'center'"),
    ],
)
@pytest.mark.usefixtures("unreadable")
def test_images_that_cannot_be_read_are_bad_usage(call, classifier, words, message):
    done = call("run", classifier, *words)
    assert (done.code, done.out) == (2, "")
    assert message in done.err


@pytest.fixture
def mixed(photos, tmp_path):
    """A folder of two photographs, a text called an image, a FIFO, a broken link, a HEIC file and a list of names."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    for name in ("coffee.jpg", "rocket.jpg"):
        shutil.copy(photos / name, folder)
    (folder / "bad.jpg").write_text("not an image")
    os.mkfifo(folder / "fifo.jpg")
    (folder / "gone.jpg").symlink_to(folder / "nowhere.jpg")
    (folder / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0")
    (folder / "labels.txt").write_text("cat\ndog\n")
    return folder


def test_a_bad_file_stops_the_run_and_names_the_way_past_it(call, classifier, mixed):
    done = call("run", classifier, mixed)
    assert (done.code, done.out) == (2, "")
    assert "bad.jpg: not an image" in done.err
    assert "--skip-corrupt" in done.err


def test_skip_corrupt_goes_on_and_names_and_counts_what_was_skipped(call, classifier, mixed):
    words = ("run", classifier, mixed, mixed / "fifo.jpg", "--skip-corrupt")
    text, told = call(*words), call(*words, "--json")
    assert (text.code, told.code) == (0, 0)
    assert "images: 2; skipped: 5." in text.out
    assert [Path(each["image"]).name for each in told.json()["images"]] == ["coffee.jpg", "rocket.jpg"]
    skipped = {Path(each["image"]).name: each["reason"] for each in told.json()["skipped"]}
    assert skipped.keys() == {"bad.jpg", "fifo.jpg", "gone.jpg", "phone.heic"}
    assert "not an image" in skipped["bad.jpg"]
    assert "is a named pipe" in skipped["fifo.jpg"]
    assert "a broken link" in skipped["gone.jpg"]
    assert skipped["phone.heic"] == "HEIC"
    for name in skipped:
        assert name in text.err
    assert "labels.txt" not in text.err


def test_nothing_left_is_an_error(call, classifier, mixed):
    done = call("run", classifier, mixed / "bad.jpg", mixed / "fifo.jpg", "--skip-corrupt", "--json")
    assert done.code == 2
    assert done.json()["error"] == "ImageError"
    assert "none of the 2 images could be read" in done.err


def test_the_same_file_may_be_given_twice(call, classifier, photos):
    told = call("run", classifier, photos / "coffee.jpg", photos / "coffee.jpg", "--json").json()
    assert len(told["images"]) == 2
    assert told["skipped"] == []


def test_linked_folders_are_followed(call, classifier, photos, tmp_path):
    (tmp_path / "classes").mkdir()
    (tmp_path / "classes/all").symlink_to(photos)
    told = call("run", classifier, tmp_path / "classes", "--json").json()
    assert [Path(each["image"]).name for each in told["images"]] == PHOTOGRAPHS


def test_a_name_that_is_no_text_is_printed_as_it_can_be(call, classifier, photos, tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jpg")
    shutil.copy(photos / "coffee.jpg", path)
    (image,) = call("run", classifier, tmp_path, "--json").json()["images"]
    assert image["image"].endswith(r"caf\xe9.jpg")
    assert call("run", classifier, path).code == 0


def test_the_examples_of_the_help_run(call, classifier, photos, tmp_path, monkeypatch):
    from deploykit.cli import inspect, run, verify

    monkeypatch.chdir(tmp_path)
    shutil.copytree(classifier, tmp_path / "resnet18-onnxruntime-fp32")
    shutil.copy(photos / "coffee.jpg", tmp_path / "photo.jpg")
    for example in (verify.EXAMPLE, inspect.EXAMPLE, run.EXAMPLE):
        done = call(*example.removeprefix("Example: deploykit ").split())
        assert done.code == 0, done.err
