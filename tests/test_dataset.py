"""Images with labels from folders, CSV, .npz and arrays; and what each mistake is told."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from deploykit.accuracy.class_indices import class_indices
from deploykit.dataset import Dataset, open_dataset, read_images
from deploykit.errors import ImageError, SpecError
from deploykit.spec import InputSpec

SPEC = InputSpec(height=16, width=16)


def save(path, value=128):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((20, 24, 3), value, np.uint8)).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    for name in ("cat/a.png", "cat/b.png", "dog/deep/c.png"):
        save(tmp_path / "images" / name)
    return tmp_path / "images"


def test_subfolders_are_labels(folder):
    found = open_dataset(folder)
    assert found.labels == ("cat", "cat", "dog")
    assert found.in_folders
    assert found.read(2, SPEC).shape == (3, 16, 16)


def test_an_image_beside_the_class_folders_leaves_no_labels(folder):
    stray = save(folder / "stray.png")
    found = open_dataset(folder)
    assert found.labels is None
    assert str(stray) in found.unlabelled


@pytest.mark.parametrize("heading", ["path,label\n", "Label,Image\n", "id,filename,class\n", ""])
def test_columns_of_a_csv_are_known_by_their_heading(folder, heading):
    swapped, extra = heading.startswith("Label"), heading.startswith("id")
    rows = [("images/cat/a.png", "3"), ("images/dog/deep/c.png", "0")]
    lines = [",".join(row[::-1] if swapped else ("x", *row) if extra else row) for row in rows]
    file = folder.parent / "list.csv"
    file.write_text(heading + "\n".join(lines) + "\n\n", encoding="utf-8-sig")
    found = open_dataset(file)
    assert found.labels == (3, 0)
    assert found.files[1] == folder / "dog/deep/c.png"


def test_a_csv_without_labels_has_none(folder):
    file = folder.parent / "list.csv"
    file.write_text("images/cat/a.png\n")
    assert open_dataset(file).labels is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,label\n", "no rows"),
        ("path,label\nimages/cat/a.png\n", "row 1 of the images has 1 columns"),
        ("path,label\nnowhere.png,1\n", "1 files that are not there"),
        ("a,b,c\n1,2,3\n", "has to name them"),
        (b"\xff\xfe\x00", "cannot be read as CSV"),
        ("path,label\nimages/cat/a.png,1\nimages/cat/b.png,\n", "1 of its 2 images have an empty label, .*b.png"),
    ],
)
def test_a_csv_that_cannot_be_used_says_why(folder, text, message):
    file = folder.parent / "list.csv"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SpecError, match=message):
        open_dataset(file)


def test_an_empty_path_is_not_the_working_directory():
    with pytest.raises(SpecError, match="empty text"):
        open_dataset("")


def test_arrays_come_from_npz(tmp_path):
    pixels, labels = np.zeros((3, 8, 8, 3), np.uint8), np.array([[0], [1], [2]])
    np.savez(tmp_path / "set.npz", x_test=pixels, y_test=labels)
    found = open_dataset(tmp_path / "set.npz")
    assert found.labels == (0, 1, 2)
    assert found.read(0, SPEC).shape == (3, 16, 16)
    grey = open_dataset((np.zeros((2, 8, 8), np.uint8), ["a", "b"]))
    assert grey.labels == ("a", "b")
    assert grey.read(0, SPEC).shape == (3, 16, 16)


def test_normalised_images_are_taken_as_they_are():
    images = np.random.default_rng(0).normal(size=(2, 3, 16, 16)).astype(np.float32)
    found = open_dataset((images, [1, 0]))
    np.testing.assert_array_equal(found.read(1, SPEC), images[1])
    with pytest.raises(SpecError, match="the model takes"):
        found.read(0, InputSpec(height=32, width=32))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ((np.zeros((2, 8, 8), np.uint8), [1]), r"\(1,\) int64 for 2 images"),
        ((np.zeros((2, 8, 8), np.uint8), [0.5, 1.5]), "float64"),
        (np.zeros((2, 8, 8)), "float64"),
        (np.zeros((0, 8, 8, 3), np.uint8), "at least one"),
        (7, "a int"),
        ("nowhere", "no such file"),
    ],
)
def test_sources_that_hold_no_images_are_named(source, message):
    with pytest.raises(SpecError, match=message):
        open_dataset(source)


def test_npz_that_is_damaged_or_holds_something_else(tmp_path):
    (tmp_path / "bad.npz").write_bytes(b"PK nothing")
    np.savez(tmp_path / "other.npz", weights=np.zeros(3))
    for name, message in (("bad.npz", "cannot be read"), ("other.npz", "holds the arrays weights")):
        with pytest.raises(SpecError, match=message):
            open_dataset(tmp_path / name)


def test_unreadable_images_are_named_or_left_out(folder):
    (folder / "cat" / "b.png").write_bytes(b"no image")
    found = open_dataset(folder)
    with pytest.raises(ImageError, match=r"b\.png"):
        read_images(found, range(3), SPEC, skip_corrupt=False)
    read, images, problems = read_images(found, range(3), SPEC, skip_corrupt=True)
    assert (read, len(images), len(problems)) == ([0, 2], 2, 1)


def labelled(*labels, in_folders=True):
    return Dataset(name="set", arrays=np.zeros((len(labels), 8, 8), np.uint8), labels=labels, in_folders=in_folders)


def test_labels_find_their_classes():
    data = labelled("dog", "cat", "Dog house")
    assert class_indices(data, 3, ("cat", "dog_house", "dog"), None).tolist() == [2, 0, 1]
    assert class_indices(data, 3, None, None).tolist() == [2, 1, 0]  # "Dog house" sorts first, as text does
    assert class_indices(data, 4, None, ("dog", "cat", "Dog house", "emu")).tolist() == [0, 1, 2]
    assert class_indices(labelled(5, 0, in_folders=False), 6, None, None).tolist() == [5, 0]


@pytest.mark.parametrize(
    ("data", "classes", "names", "given", "message"),
    [
        (labelled("a", "b"), 3, None, None, "the model has 3 classes without names"),
        (labelled("a", "b"), 2, None, ("a", "c"), "labels= hold a, c"),
        (labelled("a", "zebra"), 3, ("a", "b", "c"), None, "zebra"),
        (labelled(7, in_folders=False), 3, None, None, "stand for no class: 7"),
        (labelled(*map(str, range(11))), 11, None, None, "differ"),
        (labelled("a", "b", in_folders=False), 2, None, None, "stand for no class"),
    ],
)
def test_labels_without_a_class_are_an_error(data, classes, names, given, message):
    with pytest.raises(SpecError, match=message):
        class_indices(data, classes, names, given)
