"""From images to what a model is called with: numbers as timm's, and every kind of source."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from deploykit.errors import CalibrationError, ImageError, SpecError
from deploykit.images import preprocess as module
from deploykit.images.preprocess import denormalize, load_images, normalize, prepare_image, preprocess, read_image
from deploykit.spec import InputSpec, Preprocessing

SPEC = InputSpec(height=32, width=32)
HALF = Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def picture(width: int = 60, height: int = 40, seed: int = 0) -> Image.Image:
    """Smooth noise, so that resampling has something to do."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def folder(tmp_path) -> Path:
    root = tmp_path / "photos"
    (root / "inner").mkdir(parents=True)
    for index, name in enumerate(("b.jpg", "a.PNG", "inner/c.webp", "d.bmp")):
        picture(seed=index).save(root / name)
    (root / "notes.txt").write_text("not an image")
    return root


# ---- preprocessing


@pytest.mark.parametrize("size", [(32, 32), (64, 48), (30, 71)], ids=str)
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("image_size", [(60, 40), (41, 97), (33, 32)], ids=str)
def test_photographs_are_prepared_as_timm_prepares_them(timm, size, crop_mode, interpolation, image_size):
    pytest.importorskip("torchvision.transforms", reason="torchvision is not installed")
    how = Preprocessing(crop_mode=crop_mode, interpolation=interpolation, crop_pct=0.875)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's own
        transform = timm.data.create_transform(
            input_size=(3, *size),
            is_training=False,
            interpolation=interpolation,
            mean=how.mean,
            std=how.std,
            crop_pct=how.crop_pct,
            crop_mode=crop_mode,
        )
        image = picture(*image_size)
        expected = transform(image).numpy()
    found = prepare_image(image, InputSpec(height=size[0], width=size[1], preprocessing=how))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_range_of_a_white_image_follows_mean_and_std():
    white = prepare_image(Image.new("RGB", (50, 50), "white"), InputSpec(height=32, width=32, preprocessing=HALF))
    np.testing.assert_array_equal(white, np.ones((3, 32, 32), np.float32))


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "CMYK", "P", "YCbCr", "1"])
def test_every_colour_mode_becomes_three_channels(mode, tmp_path):
    path = tmp_path / ("image.jpg" if mode in ("CMYK", "YCbCr") else "image.png")
    source = picture(80, 80)
    source.convert(mode).save(path)
    found = read_image(path, SPEC)
    assert found.shape == (3, 32, 32)
    assert found.dtype == np.float32
    grey = mode in ("L", "LA", "1")
    expected = prepare_image(source.convert("L").convert("RGB") if grey else source, SPEC)
    assert np.abs(found - expected).mean() < (2.0 if mode == "1" else 0.25)


def test_a_palette_with_transparency_is_read_without_a_warning(tmp_path):
    path = tmp_path / "palette.png"
    picture().convert("P").save(path, transparency=bytes(range(256)))
    assert read_image(path, SPEC).shape == (3, 32, 32)


def test_16_bit_images_keep_their_greys(tmp_path):
    grey = np.linspace(0, 255, 64 * 64).astype(np.uint8).reshape(64, 64)
    Image.fromarray(grey).save(tmp_path / "8.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "16.png")
    found, expected = (read_image(tmp_path / name, SPEC) for name in ("16.png", "8.png"))
    np.testing.assert_allclose(found, expected, atol=0.03)


def test_an_image_is_turned_upright_by_its_exif_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    picture().save(tmp_path / "turned.png", exif=exif)
    found = read_image(tmp_path / "turned.png", SPEC)
    np.testing.assert_array_equal(found, prepare_image(picture().transpose(Image.Transpose.ROTATE_270), SPEC))


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (900, 4), (4, 900)], ids=str)
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_tiny_and_very_wide_images_fit(size, crop_mode):
    spec = InputSpec(height=24, width=40, preprocessing=Preprocessing(crop_mode=crop_mode))
    found = prepare_image(picture(*size), spec)
    assert found.shape == (3, 24, 40)
    assert np.isfinite(found).all()


def test_a_grey_model_takes_grey_photographs():
    spec = InputSpec(channels=1, height=32, width=32, preprocessing=Preprocessing(mean=(0.5,), std=(0.5,)))
    assert prepare_image(picture(), spec).shape == (1, 32, 32)
    border = InputSpec(
        channels=1, height=32, width=32, preprocessing=Preprocessing(mean=(0.5,), std=(0.5,), crop_mode="border")
    )
    assert prepare_image(picture(), border).shape == (1, 32, 32)


def test_photographs_do_not_fit_a_model_of_five_channels():
    spec = InputSpec(channels=5, height=32, width=32, preprocessing=Preprocessing(mean=(0.5,) * 5, std=(0.5,) * 5))
    with pytest.raises(SpecError, match=r"takes 5 channels.*arrays of shape \(N, 5, 32, 32\)"):
        prepare_image(picture(), spec)


# ---- files


def test_load_images_stacks_the_files_in_order(folder):
    found = load_images([folder / "b.jpg", str(folder / "d.bmp")], SPEC)
    assert found.shape == (2, 3, 32, 32)
    np.testing.assert_array_equal(found[1], read_image(folder / "d.bmp", SPEC))
    np.testing.assert_array_equal(load_images(folder / "d.bmp", SPEC), found[1:])


def test_load_images_names_every_bad_file(folder):
    (folder / "bad.jpg").write_bytes(b"not a jpeg")
    with pytest.raises(CalibrationError, match=r"(?s)bad\.jpg: not an image.*gone\.jpg: no such file"):
        load_images([folder / "bad.jpg", folder / "b.jpg", folder / "gone.jpg"], SPEC)
    with pytest.raises(CalibrationError, match="no image files were given"):
        load_images([], SPEC)


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_files_become_the_pixels_whose_normalised_form_the_network_takes(folder, crop_mode):
    spec = InputSpec(height=24, width=40, preprocessing=Preprocessing(crop_mode=crop_mode))
    files = [folder / "b.jpg", folder / "d.bmp"]
    found = load_images(files, spec.as_pixels())
    assert (found.shape, found.dtype) == ((2, 24, 40, 3), np.uint8)
    assert found.flags.writeable
    np.testing.assert_array_equal(normalize(found, spec.preprocessing), load_images(files, spec))


def test_grey_pixels_keep_their_one_channel():
    spec = InputSpec(channels=1, height=32, width=32, preprocessing=Preprocessing(mean=(0.5,), std=(0.5,)))
    assert prepare_image(picture(), spec.as_pixels()).shape == (32, 32, 1)


@pytest.mark.parametrize("how", [HALF, SPEC.preprocessing, Preprocessing(mean=(0, 0, 0), std=(1, 1, 1))], ids=str)
def test_denormalising_gives_every_pixel_back(how):
    every = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=-1)
    np.testing.assert_array_equal(denormalize(normalize(every, how), how), every)
    far = denormalize(np.array([-1e9, 1e9, 0], np.float32).reshape(1, 3, 1, 1), how)
    assert far.ravel().tolist()[:2] == [0, 255]


# ---- images in memory


def encoded(picture: Image.Image, form: str = "PNG") -> bytes:
    file = io.BytesIO()
    picture.save(file, form)
    return file.getvalue()


@pytest.mark.parametrize("spec", [SPEC, SPEC.as_pixels()], ids=["float", "pixels"])
def test_every_kind_of_source_gives_the_same_batch_of_one(spec, tmp_path):
    picture().save(tmp_path / "image.png")
    content = encoded(picture())
    with Image.open(tmp_path / "image.png") as opened:
        sources = [
            *(tmp_path / "image.png", str(tmp_path / "image.png"), content, bytearray(content), memoryview(content)),
            *(picture(), opened, np.asarray(picture()), np.asarray(picture().convert("RGBA"))),
            np.asfortranarray(np.asarray(picture())),
        ]
        found = [preprocess(source, spec) for source in sources]
    expected = prepare_image(picture(), spec)[None]
    assert expected.shape == (1, *spec.shape[1:])
    for each in found:
        assert each.dtype == spec.dtype
        np.testing.assert_array_equal(each, expected)
    np.testing.assert_array_equal(preprocess(sources[:3], spec), np.concatenate([expected] * 3))
    np.testing.assert_array_equal(load_images(iter(sources[3:6]), spec), np.concatenate([expected] * 3))


def test_grey_pixels_may_lack_their_channel():
    grey = np.asarray(picture().convert("L"))
    expected = preprocess(picture().convert("L"), SPEC)
    np.testing.assert_array_equal(preprocess(grey, SPEC), expected)
    np.testing.assert_array_equal(preprocess(grey[..., None], SPEC), expected)


def test_what_is_given_stays_as_it_is():
    pixels = np.asarray(picture(32, 32)).copy()
    source, opened = picture(), Image.open(io.BytesIO(encoded(picture(), "JPEG")))
    found = preprocess([pixels, source, opened], InputSpec(height=32, width=32, preprocessing=HALF).as_pixels())
    found[:] = 0
    np.testing.assert_array_equal(pixels, np.asarray(picture(32, 32)))
    assert source == picture()
    assert (opened.size, opened.mode) == ((60, 40), "RGB")


def test_one_image_in_a_list_is_a_list():
    assert preprocess([picture()], SPEC).shape == preprocess(picture(), SPEC).shape == (1, 3, 32, 32)
    assert preprocess((picture(), picture()), SPEC).shape == (2, 3, 32, 32)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, r"the image is a NoneType; expected a path, the bytes"),
        (7, "the image is a int"),
        ({"image": "a.jpg"}, "the image is a dict"),
        ({"a.jpg"}, "the image is a set"),
        (io.BytesIO(b"\x89PNG"), r"a BytesIO.*Fix: pass file.read\(\)"),
        (torch.zeros(32, 32, 3), r"a Tensor of shape \(32, 32, 3\).*Fix: pass tensor.numpy\(\)"),
        ([None], "image 0 is a NoneType"),
        ([[picture()]], "image 0 is a list"),
        ([picture(), 3.5], "image 1 is a float"),
        (np.zeros((32, 32, 3), np.float32), r"array of float32 \(32, 32, 3\); expected uint8.*\(array \* 255\)"),
        (np.zeros((3, 32, 48), np.uint8), r"Fix: this looks like \(C, H, W\), so pass array.transpose\(1, 2, 0\)"),
        (np.zeros((4, 32, 32, 3), np.uint8), r"uint8 \(4, 32, 32, 3\).*Fix: pass list\(array\)"),
        (np.zeros((32, 32), np.uint16), r"uint16 \(32, 32\).*scale to 0..255"),
        (np.zeros((32, 32), bool), "array of bool"),
        (np.zeros((0, 32, 3), np.uint8), "not empty"),
        (np.zeros((32, 32, 2), np.uint8), r"\(32, 32, 2\)"),
        (np.zeros((), np.uint8), r"uint8 \(\)"),
        (np.array(["a.jpg"]), "array of <U5"),
        (np.array([picture()], object), "array of object"),
    ],
    ids=lambda value: "" if isinstance(value, str) else type(value).__name__,
)
def test_what_is_no_image_says_what_was_seen_and_expected(source, message):
    for function in (preprocess, load_images):
        with pytest.raises(SpecError, match=message):
            function(source, SPEC)


@pytest.mark.parametrize(
    "spec", [None, {"height": 32}, (3, 32, 32), Preprocessing()], ids=lambda spec: type(spec).__name__
)
def test_a_spec_is_an_input_spec(spec):
    with pytest.raises(SpecError, match=r"spec is a \w+.*Fix: pass model.input_spec"):
        preprocess(picture(), spec)


def test_bad_images_of_a_list_are_each_named(tmp_path):
    sources = [picture(), b"nonsense", tmp_path / "gone.jpg", encoded(picture())[:60], picture().convert("F")]
    with pytest.raises(ImageError) as caught:
        preprocess(sources, SPEC)
    lines = str(caught.value).splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("image 1 (8 bytes): not an image")
    assert "gone.jpg: no such file" in lines[1]
    assert lines[2].startswith("image 3 (60 bytes): cannot be decoded")
    assert lines[3].startswith("image 4: is of Pillow's mode 'F'")


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=40)
    | hnp.arrays(hnp.scalar_dtypes(), hnp.array_shapes(max_dims=5, max_side=4)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=300, deadline=None)
@given(JUNK)
def test_anything_is_an_image_or_a_typed_error(source):
    try:
        found = preprocess(source, SPEC)
    except SpecError as error:
        assert str(error)
    else:
        assert found.shape[1:] == (3, 32, 32)


# ---- thin images


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("size", [(60, 40), (41, 97), (5, 300), (300, 5), (1, 200), (33, 32)], ids=str)
@pytest.mark.parametrize("target", [(32, 32), (24, 40)], ids=str)
def test_cropping_first_gives_what_cropping_last_gives(interpolation, size, target, monkeypatch):
    how = Preprocessing(interpolation=interpolation)
    spec = InputSpec(height=target[0], width=target[1], preprocessing=how).as_pixels()
    last = prepare_image(picture(*size), spec).astype(np.int16)
    monkeypatch.setattr(module, "MOST_RESIZED_PIXELS", 0)
    first = prepare_image(picture(*size), spec).astype(np.int16)
    differing = np.abs(first - last)
    # Pillow keeps the box in single precision; the nearest of two that are as near may be the other one.
    most, mean = (255, 3) if interpolation == "nearest" else (2, 0.25)
    assert differing.max() <= most
    assert differing.mean() < mean


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_greys_are_prepared_as_their_colours(crop_mode):
    spec = InputSpec(height=24, width=40, preprocessing=Preprocessing(crop_mode=crop_mode))
    for size in ((60, 40), (40, 90)):
        grey = picture(*size).convert("L")
        np.testing.assert_array_equal(prepare_image(grey, spec), prepare_image(grey.convert("RGB"), spec))


@pytest.mark.parametrize("shape", [(5, 7, 3), (2, 5, 7, 3), (4, 6, 1)])
def test_pixels_are_normalised_to_the_bits_of_the_formula(shape):
    how = Preprocessing(mean=(0.485, 0.456, 0.406)[: shape[-1]], std=(0.229, 0.224, 0.225)[: shape[-1]])
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    mean, std = (np.asarray(values, np.float32) for values in (how.mean, how.std))
    expected = np.moveaxis((pixels.astype(np.float32) / 255 - mean) / std, -1, -3)
    found = normalize(pixels, how)
    assert found.flags.c_contiguous and found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)
