"""Class names: from files, mappings and class folders, one for each class or refused."""

from __future__ import annotations

import json
import os

import pytest

from deploykit.errors import SpecError
from deploykit.labels import check_count, folder_labels, parse_labels

NAMES = ("cat", "dog", "grey owl")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("names.txt", "cat\ndog\ngrey owl\n"),
        ("windows.txt", "\ufeffcat\r\n dog \r\ngrey owl"),
        ("list.json", json.dumps(NAMES)),
        ("by_index.json", json.dumps({"2": "grey owl", "0": "cat", "1": "dog"})),
        ("by_name.json", json.dumps({"grey owl": 2, "cat": 0, "dog": 1})),
        ("synsets.json", json.dumps({"0": ["n1", "cat"], "1": ["n2", "dog"], "2": ["n3", "grey owl"]})),
        ("json.labels", json.dumps(NAMES)),
    ],
)
def test_a_file_gives_its_names_in_index_order(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert parse_labels(tmp_path / name) == NAMES
    assert parse_labels(str(tmp_path / name)) == NAMES


def test_a_file_without_end_is_refused():
    with pytest.raises(SpecError, match=r"/dev/zero has more than \d+ bytes"):
        parse_labels("/dev/zero")


def test_names_may_come_through_a_pipe():
    reader, writer = os.pipe()
    os.write(writer, "\n".join(NAMES).encode())
    os.close(writer)
    assert parse_labels(f"/dev/fd/{reader}") == NAMES
    os.close(reader)


def test_text_that_only_begins_like_json_is_text(tmp_path):
    (tmp_path / "names.txt").write_text("[unknown]\ncat\n")
    assert parse_labels(tmp_path / "names.txt") == ("[unknown]", "cat")


@pytest.mark.parametrize("source", [NAMES, list(NAMES), dict(enumerate(NAMES)), {"dog": 1, "cat": 0, "grey owl": 2}])
def test_names_and_mappings_are_taken_as_they_are(source):
    assert parse_labels(source) == NAMES


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({0: "cat", 2: "dog"}, "the indices are 0, 2; expected 0 to 1"),
        ({0: "cat", "0": "dog"}, "expected 0 to 1"),
        (["cat", ""], "the name of class 1 is ''"),
        (["cat", "two\nlines"], "expected one line of text"),
        ([1, 2], "the name of class 0 is 1"),
        ([], "no class names"),
        (3, "got int"),
        (b"cat", "got bytes"),
        ("absent.txt", "cannot be read"),
    ],
)
def test_what_is_no_list_of_names_is_refused(source, message):
    with pytest.raises(SpecError, match=message):
        parse_labels(source)


def test_a_broken_json_file_and_a_binary_file_are_named(tmp_path):
    (tmp_path / "names.json").write_text("{cat")
    (tmp_path / "names.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SpecError, match=r"names\.json is not JSON"):
        parse_labels(tmp_path / "names.json")
    with pytest.raises(SpecError, match=r"names\.txt cannot be read: it is not UTF-8"):
        parse_labels(tmp_path / "names.txt")


def test_names_are_counted():
    check_count(NAMES, 3)
    with pytest.raises(SpecError, match="3 labels and the classifier has 10 classes"):
        check_count(NAMES, 10)
    with pytest.raises(SpecError, match="has no classes"):
        check_count(NAMES, 0)


@pytest.fixture
def photographs(tmp_path):
    """One image in each class folder; the folders are made in another order than they sort in."""
    for name in ("owl", "cat", "dog"):
        (tmp_path / name / "more").mkdir(parents=True)
        (tmp_path / name / "more" / "1.jpg").touch()
    return tmp_path


def files(folder):
    return sorted(folder.rglob("*.jpg"))


def test_class_folders_are_in_the_order_in_which_they_sort(photographs):
    assert folder_labels(photographs, files(photographs), 3) == ("cat", "dog", "owl")


def test_folders_that_are_not_one_a_class_say_nothing(photographs):
    assert folder_labels(photographs, files(photographs), 10) is None
    (photographs / "empty").mkdir()
    assert folder_labels(photographs, files(photographs), 3) is None
    assert folder_labels(photographs, files(photographs), 4) is None


def test_an_image_outside_of_the_class_folders_makes_them_ambiguous(photographs):
    (photographs / "0.jpg").touch()
    assert folder_labels(photographs, files(photographs), 3) is None
    assert folder_labels(photographs, [], 3) is None
