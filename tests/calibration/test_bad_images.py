"""What users really have in their folders: each becomes a typed error, a warning, or what they meant."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deploykit.calibration.images import calibration_set
from deploykit.calibration.precision import plan_precision
from deploykit.errors import CalibrationError, CalibrationWarning
from deploykit.images.preprocess import read_image
from deploykit.spec import InputSpec, Int8
from tests.calibration.networks import SIDE

SPEC = InputSpec(height=SIDE, width=SIDE)
PIXELS = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)


def told(residual, source) -> list[str]:
    """The warnings of calibrating on a source."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plan_precision(
            residual.graph.model,
            Int8(),
            calibration=calibration_set(source, SPEC),
            probe=residual.images[:1],
            weights_digest="weights",
        )
    assert all(entry.category is CalibrationWarning for entry in caught)
    return [str(entry.message) for entry in caught]


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(CalibrationError, match=r"no image files in the folder \(0 other files\)"):
        calibration_set(tmp_path, SPEC)


def test_a_folder_of_texts_is_refused_with_their_number(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text("0 0.5 0.5 0.1 0.1")
    with pytest.raises(CalibrationError, match=r"no image files in the folder \(3 other files\)"):
        calibration_set(tmp_path, SPEC)


def test_texts_called_images_are_each_named(tmp_path):
    for number in range(2):
        (tmp_path / f"{number}.jpg").write_text("not a photograph")
    with pytest.raises(CalibrationError, match=r"(?s)0\.jpg: not an image.*1\.jpg: not an image.*skip_corrupt=True"):
        list(calibration_set(tmp_path, SPEC).images())


@pytest.mark.parametrize("keep", [0.0, 0.4, 0.97])
def test_a_truncated_jpeg_is_refused_however_little_is_missing(keep, tmp_path):
    path = tmp_path / "image.jpg"
    Image.fromarray(PIXELS).save(path)
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(CalibrationError, match=r"image\.jpg: (cannot be decoded|not an image)"):
        read_image(path, SPEC)


def test_an_image_too_large_to_decode_safely_is_refused(tmp_path):
    Image.new("1", (20000, 10000)).save(tmp_path / "huge.png")
    with pytest.raises(CalibrationError, match=r"huge\.png: cannot be decoded.*decompression bomb"):
        read_image(tmp_path / "huge.png", SPEC)


def test_a_large_photograph_is_read(tmp_path):
    Image.new("RGB", (6000, 4000), "orange").save(tmp_path / "large.jpg")
    assert read_image(tmp_path / "large.jpg", SPEC).shape == (3, SIDE, SIDE)


def test_the_first_picture_of_an_animation_is_read(tmp_path):
    frames = [Image.fromarray(PIXELS), Image.fromarray(255 - PIXELS)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "still.gif")
    moving, still = (read_image(tmp_path / name, SPEC) for name in ("moving.gif", "still.gif"))
    np.testing.assert_array_equal(moving, still)


def test_files_that_are_no_files_are_left_out(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "image.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    assert [path.name for path in calibration_set(tmp_path, SPEC).files] == ["image.png"]


def test_what_was_left_out_is_named_once_and_texts_are_logged(residual, tmp_path, caplog):
    for number in range(16):
        Image.fromarray(np.roll(PIXELS, number, 1)).save(tmp_path / f"{number}.png")
    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0")
    with caplog.at_level(logging.INFO, logger="deploykit"):
        (message,) = told(residual, tmp_path)
    assert message.startswith("1 file was left out of the images: ")
    assert message.endswith("a.heic (HEIC).")
    assert "2 files were left out of the images" in caplog.text
    assert "labels.txt (not an image)" in caplog.text


def test_a_fifo_or_device_as_calibration_is_refused_without_waiting(tmp_path):
    for name in ("images.jpg", "images.npy"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(CalibrationError, match=rf"{name}: is a named pipe"):
            list(calibration_set(tmp_path / name, SPEC).images())
    with pytest.raises(CalibrationError, match="/dev/zero: is a device"):
        list(calibration_set("/dev/zero", SPEC).images())


def test_files_that_are_skipped_do_not_stop_the_digest(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "0.png")
    os.mkfifo(tmp_path / "1.png")
    (tmp_path / "2.png").symlink_to(tmp_path / "gone.png")
    files = [tmp_path / f"{number}.png" for number in range(3)]
    skipping = calibration_set(files, SPEC, skip_corrupt=True)
    assert skipping.digest == calibration_set(files, SPEC, skip_corrupt=True).digest
    with pytest.warns(UserWarning, match="left out of calibration") as caught:
        assert len(list(skipping.images())) == 1
    assert len(caught) == 2
    with pytest.raises(CalibrationError, match=r"1\.png: is a named pipe"):
        _ = calibration_set(files, SPEC).digest
    with pytest.raises(CalibrationError, match=r"(?s)1\.png: is a named pipe.*2\.png: no such file"):
        list(calibration_set(files, SPEC).images())


def test_names_that_are_no_text_are_found_and_shown(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "0.png")
    (tmp_path / "0.png").rename(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png"))
    (tmp_path / os.fsdecode(b"b\xff.jpg")).write_text("not an image")
    images = calibration_set(tmp_path, SPEC)
    assert len(images) == 2
    with pytest.raises(CalibrationError, match=r"b\\xff\.jpg: not an image"):
        list(images.images())


def test_one_image_calibrates_with_a_warning(residual, tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "image.png")
    (message,) = told(residual, tmp_path)
    assert message.startswith("only 1 different calibration image")


def test_copies_of_one_image_are_told(residual, tmp_path):
    for number in range(20):
        Image.fromarray(PIXELS).save(tmp_path / f"{number}.png")
    assert told(residual, tmp_path)[0].startswith("all 20 calibration images are identical")


def test_blank_images_among_good_ones_are_counted(residual, tmp_path):
    for number in range(18):
        Image.fromarray(np.roll(PIXELS, number, 1)).save(tmp_path / f"{number}.png")
    Image.new("RGB", (64, 48), "grey").save(tmp_path / "blank.png")
    (message,) = told(residual, tmp_path)
    assert message.startswith("1 of 19 calibration images are constant")


@pytest.mark.parametrize(
    ("scale", "message"), [(1.0, "pixels divided by 255"), (1 / 255, "mean and std left out")], ids=["0-255", "0-1"]
)
def test_pixels_given_as_normalised_floats_are_told(residual, scale, message):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 3, SIDE, SIDE)).astype(np.float32) * np.float32(scale)
    (said,) = told(residual, pixels)
    assert message in said


def test_a_mapped_file_is_read_whole_and_in_order(tmp_path: Path):
    images = np.random.default_rng(0).normal(size=(40, 3, SIDE, SIDE)).astype(np.float32)
    np.save(tmp_path / "images.npy", images)
    mapped = calibration_set(tmp_path / "images.npy", SPEC)
    np.testing.assert_array_equal(np.stack(list(mapped.images())), images)
    np.testing.assert_array_equal(np.stack(list(mapped.images(skip=17))), images[17:])
    assert mapped.digest == calibration_set(images, SPEC).digest
