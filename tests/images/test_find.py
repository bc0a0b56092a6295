"""Every image below a folder is found once, also behind links, and everything else is counted and named."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deploykit.calibration.images import calibration_set
from deploykit.errors import CalibrationError
from deploykit.images.find import describe_left_out, find_images
from deploykit.spec import InputSpec

SPEC = InputSpec(height=32, width=32)


def write(folder: Path, *names: str) -> Path:
    """Different images of these names in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 20, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name, "PNG")
    return folder


def names(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in find_images(folder).files]


# ---- what macOS lays beside images


def test_resource_forks_are_left_out_without_a_warning_and_images_of_such_a_name_are_not(tmp_path):
    write(tmp_path, "a.png", "._b.png")
    (tmp_path / "._a.png").write_bytes(b"\0\x05\x16\x07" + bytes(60))
    assert names(tmp_path) == ["._b.png", "a.png"]
    assert not calibration_set(tmp_path, SPEC).surprises()


# ---- links


@pytest.mark.parametrize("relative", [False, True])
def test_class_folders_that_are_links_are_followed(relative, tmp_path):
    write(tmp_path / "store/dog", "0.png", "1.png")
    write(tmp_path / "classes/cat", "0.png")
    target = Path("../store/dog") if relative else tmp_path / "store/dog"
    (tmp_path / "classes/dog").symlink_to(target)
    assert names(tmp_path / "classes") == ["cat/0.png", "dog/0.png", "dog/1.png"]
    assert len(calibration_set(tmp_path / "classes", SPEC)) == 3


def test_a_link_may_lead_to_a_link_and_to_a_tree(tmp_path):
    write(tmp_path / "store/deep/er", "0.png")
    (tmp_path / "first").symlink_to(tmp_path / "store")
    (tmp_path / "classes").mkdir()
    (tmp_path / "classes/dog").symlink_to(tmp_path / "first")
    assert names(tmp_path / "classes") == ["dog/deep/er/0.png"]
    (tmp_path / "whole").symlink_to(tmp_path / "classes")
    assert names(tmp_path / "whole") == ["dog/deep/er/0.png"]


@pytest.mark.parametrize("target", [".", "..", "../..", "../../b"], ids=["itself", "parent", "root", "sibling"])
def test_links_in_a_circle_end(target, tmp_path):
    write(tmp_path / "root/a/inner", "0.png")
    write(tmp_path / "root/b", "1.png")
    (tmp_path / "root/a/inner/loop").symlink_to(target)
    (tmp_path / "root/b/back").symlink_to("../a")
    assert names(tmp_path / "root") == ["a/inner/0.png", "b/1.png"]


def test_many_folders_that_link_to_each_other_are_each_read_once(tmp_path):
    """Which have more paths than can be walked."""
    folders = [write(tmp_path / f"{number:02}", "0.png") for number in range(14)]
    for folder in folders:
        for other in folders:
            (folder / f"to-{other.name}").symlink_to(other)
    assert names(tmp_path) == [f"{number:02}/0.png" for number in range(14)]


def test_a_folder_that_is_linked_inside_its_own_tree_counts_once_under_its_own_name(tmp_path):
    write(tmp_path / "store", "0.png", "1.png")
    (tmp_path / "all").symlink_to("store")
    found = find_images(tmp_path)
    assert names(tmp_path) == ["store/0.png", "store/1.png"]
    assert [(each.path.name, each.reason) for each in found.left_out] == [
        ("all", "a link to a folder that is read already")
    ]


def test_an_image_that_is_a_link_is_read(tmp_path):
    write(tmp_path / "store", "0.png")
    (tmp_path / "classes").mkdir()
    (tmp_path / "classes/9.png").symlink_to(tmp_path / "store/0.png")
    assert names(tmp_path / "classes") == ["9.png"]


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    write(tmp_path / "closed", "0.png")
    listed = Path.iterdir

    def refusing(path: Path):
        if path.name == "closed":
            raise PermissionError(13, "Permission denied")
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", refusing)
    with pytest.raises(CalibrationError, match=r"closed: cannot be listed \(Permission denied\)"):
        calibration_set(tmp_path, SPEC)


# ---- what counts as an image


def test_an_image_is_known_by_its_suffix_or_by_its_content(tmp_path):
    write(tmp_path, "a.PNG", "b.jfif", "IMG_001", "photo.jpg_large", "x.bin")
    assert names(tmp_path) == ["IMG_001", "a.PNG", "b.jfif", "photo.jpg_large", "x.bin"]


def test_what_may_have_been_meant_as_an_image_is_named_with_its_reason(tmp_path):
    write(tmp_path, "0.png")
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0")
    (tmp_path / "b.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0")
    (tmp_path / "c.raw").write_bytes(bytes(100))
    (tmp_path / "d.jpg").symlink_to(tmp_path / "gone.jpg")
    os.mkfifo(tmp_path / "e.jpg")
    (tmp_path / "notes.txt").write_text("P1 is a text")
    (tmp_path / ".DS_Store").write_bytes(bytes(10))
    found = find_images(tmp_path)
    assert [path.name for path in found.files] == ["0.png"]
    reasons = {each.path.name: (each.reason, each.expected) for each in found.left_out}
    assert reasons == {
        ".DS_Store": ("not an image", True),
        "a.heic": ("HEIC", False),
        "b.eps": ("PostScript", False),
        "c.raw": ("not an image", False),
        "d.jpg": ("a broken link: No such file or directory", False),
        "e.jpg": ("a named pipe", False),
        "notes.txt": ("not an image", True),
    }


def test_long_lists_are_counted(tmp_path):
    write(tmp_path, "0.png")
    for number in range(30):
        (tmp_path / f"{number:02}.psd").write_bytes(b"8BPS")
    message = describe_left_out(find_images(tmp_path).left_out)
    assert message.startswith("30 files were left out of the images: ")
    assert message.endswith("19.psd (Photoshop), and 10 more.")
