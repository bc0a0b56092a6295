from __future__ import annotations

import itertools
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from deploykit.calibration.images import CalibrationSet, calibration_set
from deploykit.errors import CalibrationError
from deploykit.images.preprocess import normalize
from deploykit.spec import InputSpec, Preprocessing

SPEC = InputSpec(height=32, width=32)
HALF = Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def picture(width: int = 60, height: int = 40, seed: int = 0) -> Image.Image:
    """Smooth noise, so that resampling has something to do."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def arrays(count: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 3, 32, 32)).astype(np.float32)


@pytest.fixture
def folder(tmp_path) -> Path:
    root = tmp_path / "photos"
    (root / "inner").mkdir(parents=True)
    for index, name in enumerate(("b.jpg", "a.PNG", "inner/c.webp", "d.bmp")):
        picture(seed=index).save(root / name)
    (root / "notes.txt").write_text("not an image")
    return root


# ---- files


def test_a_folder_is_searched_recursively_in_a_stable_order(folder):
    found = calibration_set(folder, SPEC)
    assert [file.name for file in found.files] == ["a.PNG", "b.jpg", "d.bmp", "c.webp"]
    assert len(found) == 4
    assert len(list(found.images())) == 4


def test_a_list_may_mix_files_and_folders(folder):
    found = calibration_set([folder / "d.bmp", str(folder / "inner")], SPEC)
    assert [file.name for file in found.files] == ["d.bmp", "c.webp"]


def test_a_folder_without_images_says_what_it_holds(tmp_path):
    with pytest.raises(CalibrationError, match=r"no image files in the folder \(0 other files\).*\.jpeg"):
        calibration_set(tmp_path, SPEC)
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(CalibrationError, match="1 other files"):
        calibration_set(str(tmp_path), SPEC)
    with pytest.raises(CalibrationError, match="no such file or folder"):
        calibration_set(tmp_path / "absent", SPEC)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_corrupt_jpeg_among_good_ones_is_named(folder):
    truncate(folder / "b.jpg")
    with pytest.raises(CalibrationError, match=r"(?s)b\.jpg: cannot be decoded.*skip_corrupt=True"):
        list(calibration_set(folder, SPEC).images())


def test_a_corrupt_jpeg_is_left_out_with_a_warning_when_asked(folder):
    truncate(folder / "b.jpg")
    with pytest.warns(UserWarning, match=r"left out of calibration: .*b\.jpg") as caught:
        images = list(calibration_set(folder, SPEC, skip_corrupt=True).images())
    assert len(images) == 3
    assert len(caught) == 1


def test_nothing_left_after_skipping_is_an_error(tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"bad")
    with pytest.warns(UserWarning, match="left out"), pytest.raises(CalibrationError, match="none of the 1"):
        list(calibration_set(tmp_path, SPEC, skip_corrupt=True).images())


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that cannot be read: /proc/self/mem")
def test_an_unreadable_file_is_named():
    found = calibration_set([Path("/proc/self/mem")], SPEC)
    with pytest.raises(CalibrationError, match="/proc/self/mem: cannot be"):
        list(found.images())
    with pytest.raises(CalibrationError, match="/proc/self/mem: cannot be read"):
        _ = found.digest


# ---- arrays and iterables


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_arrays_come_from_numpy_files(suffix, tmp_path):
    path = tmp_path / f"images{suffix}"
    np.save(path, arrays()) if suffix == ".npy" else np.savez(path, images=arrays())
    found = calibration_set(path, SPEC)
    np.testing.assert_array_equal(np.stack(list(found.images())), arrays())
    assert found.digest == calibration_set(arrays(), SPEC).digest


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [("bad.npy", b"nonsense", "not a readable NumPy file"), ("bad.npz", b"nonsense", "not a readable NumPy file")],
)
def test_a_broken_numpy_file_is_named(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=rf"{name}: {message}"):
        calibration_set(tmp_path / name, SPEC)


def test_numpy_files_with_pickles_several_arrays_or_no_bytes_are_refused(tmp_path):
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(CalibrationError, match="without pickles"):
        calibration_set(tmp_path / "objects.npy", SPEC)
    np.savez(tmp_path / "two.npz", one=arrays(), two=arrays())
    with pytest.raises(CalibrationError, match=r"\['one', 'two'\]; expected exactly one"):
        calibration_set(tmp_path / "two.npz", SPEC)
    with pytest.raises(CalibrationError, match="no such file"):
        calibration_set(tmp_path / "gone.npy", SPEC)


@pytest.mark.parametrize(
    "array",
    [
        arrays().astype(np.float64),
        (arrays() * 40 + 128).clip(0, 255).astype(np.uint8),
        arrays().transpose(0, 2, 3, 1),
        arrays()[0],
        arrays()[:, :, :16],
    ],
    ids=["float64", "uint8", "NHWC", "no batch", "size"],
)
def test_an_array_of_another_shape_or_dtype_is_refused(array):
    with pytest.raises(CalibrationError, match=r"expected|\(N, 3, 32, 32\) float32, normalised"):
        calibration_set(array, SPEC)


def test_an_empty_array_is_refused():
    with pytest.raises(CalibrationError, match="holds no images"):
        calibration_set(arrays()[:0], SPEC)


def test_nan_in_an_array_is_named_by_its_position():
    bad = arrays()
    bad[3, 0, 0, 0] = np.nan
    found = calibration_set(bad, SPEC)
    with pytest.raises(CalibrationError, match="image 3 of the calibration set"):
        list(found.images())
    with pytest.raises(CalibrationError, match="NaN"):
        found.sample(5)


def test_a_one_shot_generator_can_be_read_on_every_pass():
    found = calibration_set((arrays()[start : start + 2] for start in (0, 2, 4)), SPEC)
    for _ in range(2):
        np.testing.assert_array_equal(np.stack(list(found.images())), arrays())
    assert found.digest == calibration_set(arrays(), SPEC).digest


def test_batches_may_be_tensors_and_tuples_as_a_dataloader_gives():
    dataset = torch.utils.data.TensorDataset(torch.from_numpy(arrays()), torch.arange(5))
    for source in (torch.utils.data.DataLoader(dataset, batch_size=2), torch.from_numpy(arrays())):
        np.testing.assert_array_equal(np.stack(list(calibration_set(source, SPEC).images())), arrays())


def test_a_list_of_arrays_is_an_iterable_of_batches():
    assert len(calibration_set([arrays(2), arrays(3)], SPEC)) == 5


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (iter(()), "gave no batches"),
        ([], "gave no batches"),
        (iter([arrays()[0]]), r"a batch of the iterable is \(3, 32, 32\)"),
        (iter([arrays(), arrays()[:, :, :16]]), "all of one size"),
        (7, "calibration is a int"),
    ],
    ids=["empty iterator", "empty list", "rank", "ragged", "number"],
)
def test_other_iterables_are_refused(source, message):
    with pytest.raises(CalibrationError, match=message):
        calibration_set(source, SPEC)


@pytest.mark.parametrize("kind", [iter, set, tuple, np.array, lambda paths: map(str, paths)])
def test_paths_may_come_in_any_iterable(folder, kind):
    paths = sorted(folder.glob("*.jpg")) + sorted(folder.glob("*.bmp"))
    if kind is np.array:
        paths = list(map(str, paths))
    assert [path.name for path in calibration_set(kind(paths), SPEC).files] == ["b.jpg", "d.bmp"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "empty text"),
        (["photo.jpg", ""], "has paths and a str"),
        (["photo.jpg", arrays()], "has paths and a ndarray"),
        ([arrays(), Path("photo.jpg")], "is a PosixPath; expected an array"),
        (["images.npy"], "images.npy is a file of arrays in a list"),
        (b"photos", "calibration is a bytes"),
        ({"images": arrays()}, "calibration is a dict"),
        ([{"label": 1, "pixel_values": arrays()}], r"keys label, pixel_values; .* \(batch\['pixel_values'\] for batch"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.bfloat16), r"calibration is of bfloat16.*tensor.float\(\)"),
        ([torch.zeros(2, 3, 32, 32, dtype=torch.bfloat16)], r"a batch of the iterable is of bfloat16"),
    ],
)
def test_what_else_people_pass_is_named(source, message):
    with pytest.raises(CalibrationError, match=message):
        calibration_set(source, SPEC)


def test_an_iterable_without_an_end_is_refused(monkeypatch):
    monkeypatch.setattr("deploykit.calibration.spooled_batches.MOST_IMAGES", 50)
    with pytest.raises(CalibrationError, match="more than 50 images; expected one with an end"):
        calibration_set(itertools.repeat(arrays()), SPEC)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_told(monkeypatch, tmp_path):
    (tmp_path / "images").symlink_to("/dev/full")
    monkeypatch.setattr("deploykit.calibration.spooled_batches.scratch_folder", lambda _: nullcontext(tmp_path))
    with pytest.raises(CalibrationError, match=r"5 images of the iterable cannot be kept in .* Fix: give fewer"):
        calibration_set([arrays()], SPEC)


@pytest.mark.parametrize("damage", [lambda content: content[:-100], lambda content: content.replace(b"abcd", b"abce")])
def test_a_damaged_archive_of_arrays_is_refused(damage, tmp_path):
    images = arrays()
    images.reshape(-1).view("S4")[100] = b"abcd"
    np.savez(tmp_path / "images.NPZ.npz", images)
    file = (tmp_path / "images.NPZ.npz").rename(tmp_path / "images.NPZ")
    np.testing.assert_array_equal(np.stack(list(calibration_set(file, SPEC).images())), images)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CalibrationError, match="not a readable NumPy file"):
        calibration_set(file, SPEC)


def test_a_set_made_for_another_input_is_refused():
    made = calibration_set(arrays(), SPEC)
    assert calibration_set(made, InputSpec(batch=4, height=32, width=32)) is made
    with pytest.raises(CalibrationError, match=r"made for .*\(3, 32, 32\).*\(3, 64, 64\)"):
        calibration_set(made, InputSpec(height=64, width=64))


# ---- a set's own promises


def test_the_digest_follows_content_preprocessing_and_order_but_not_names(folder, tmp_path):
    digest = calibration_set(folder, SPEC).digest
    moved = tmp_path / "elsewhere"
    shutil.copytree(folder, moved)
    (moved / "b.jpg").rename(moved / "bb.jpg")
    assert calibration_set(moved, SPEC).digest == digest
    files = list(calibration_set(folder, SPEC).files)
    others = {
        calibration_set(files[::-1], SPEC).digest,
        calibration_set(files[:-1], SPEC).digest,
        calibration_set(folder, InputSpec(height=32, width=32, preprocessing=HALF)).digest,
        calibration_set(folder, InputSpec(height=32, width=64)).digest,
    }
    picture(seed=9).save(moved / "d.bmp")
    others.add(calibration_set(moved, SPEC).digest)
    assert len(others) == 5
    assert digest not in others


def test_a_sample_is_spread_evenly_over_the_set():
    images = np.broadcast_to(np.arange(10, dtype=np.float32)[:, None, None, None], (10, 3, 32, 32))
    found = calibration_set(np.ascontiguousarray(images), SPEC)
    assert found.sample(4)[:, 0, 0, 0].tolist() == [0, 3, 6, 9]
    assert found.sample(99)[:, 0, 0, 0].tolist() == list(range(10))
    assert found.sample(1).shape == (1, 3, 32, 32)


def test_a_sample_of_files_reads_only_those(folder):
    found = calibration_set(folder, SPEC)
    truncate(folder / "b.jpg")  # the second of four
    assert found.sample(2).shape == (2, 3, 32, 32)


def test_a_last_partial_batch_is_filled_up_with_its_own_images():
    batches = list(calibration_set(arrays(5), SPEC).batches(3))
    assert [batch.shape for batch in batches] == [(3, 3, 32, 32)] * 2
    np.testing.assert_array_equal(batches[1], arrays(5)[[3, 4, 3]])


def test_a_set_can_be_smaller_than_a_batch():
    (batch,) = CalibrationSet(spec=SPEC, arrays=arrays(1)).batches(3)
    np.testing.assert_array_equal(batch, arrays(1)[[0, 0, 0]])


# ---- pixels, for engines that embed the preprocessing


def pixels(count: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), np.uint8)


@pytest.mark.parametrize(
    "source",
    [pixels(), torch.from_numpy(pixels()), iter([pixels()[:2], pixels()[2:]])],
    ids=["array", "tensor", "iterable"],
)
def test_pixels_calibrate_a_pixel_engine_as_normalised_images(source):
    found = calibration_set(source, SPEC.as_pixels())
    expected = normalize(pixels(), SPEC.preprocessing)
    np.testing.assert_array_equal(np.stack(list(found.images())), expected)
    np.testing.assert_array_equal(found.sample(5), expected)
    assert found.digest == calibration_set(pixels(), SPEC.as_pixels()).digest


def test_pixels_come_from_numpy_files(tmp_path):
    np.save(tmp_path / "pixels.npy", pixels())
    found = calibration_set(tmp_path / "pixels.npy", SPEC.as_pixels())
    np.testing.assert_array_equal(found.sample(2), normalize(pixels()[[0, 4]], SPEC.preprocessing))


def test_a_pixel_engine_is_calibrated_on_files_and_normalised_arrays_as_a_float_engine(folder):
    for source in (folder, arrays(), [folder / "b.jpg"]):
        of_pixels, of_floats = (calibration_set(source, spec) for spec in (SPEC.as_pixels(), SPEC))
        assert of_pixels == of_floats if source is not arrays else True
        np.testing.assert_array_equal(of_pixels.sample(2), of_floats.sample(2))
        assert of_pixels.digest == of_floats.digest
    made = calibration_set(folder, SPEC)
    assert calibration_set(made, SPEC.as_pixels()) is made


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            pixels().transpose(0, 3, 1, 2),
            r"\(5, 3, 32, 32\) uint8.*\(N, 32, 32, 3\) uint8, from 0 to 255, or \(N, 3, 32",
        ),
        (pixels().astype(np.float32), r"\(5, 32, 32, 3\) float32"),
        (iter([pixels(), arrays()]), r"a batch of the iterable is \(5, 3, 32, 32\) float32"),
        (iter([pixels().astype(np.int64)]), r"int64; expected \(N, H, W, C\) uint8 or"),
    ],
    ids=["layout", "dtype", "mixed", "integers"],
)
def test_what_is_neither_pixels_nor_normalised_is_refused(source, message):
    with pytest.raises(CalibrationError, match=message):
        calibration_set(source, SPEC.as_pixels())


def test_a_float_engine_is_not_calibrated_on_pixels():
    with pytest.raises(CalibrationError, match="float32, normalised"):
        calibration_set(pixels(), SPEC)
    with pytest.raises(CalibrationError, match="a batch of the iterable"):
        calibration_set(iter([pixels()]), SPEC)


def test_a_path_that_no_file_can_have_is_named():
    with pytest.raises(CalibrationError, match=r"xxx.*: cannot be opened .*Fix: check the path"):
        calibration_set("x" * 300, SPEC)
