"""Every mode and format that Pillow opens is scaled rightly or refused by name, and nothing else is run."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image, ImageCms

from deploykit.errors import CalibrationError, ImageError, SpecError
from deploykit.images import decode
from deploykit.images.decode import decode_bytes, decode_file, decode_picture, shown
from deploykit.images.preprocess import preprocess
from deploykit.spec import InputSpec

SPEC = InputSpec(height=16, width=16)
COARSE = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
PICTURE = Image.fromarray(COARSE).resize((60, 40), Image.Resampling.BICUBIC)
GREY = PICTURE.convert("L")
GREYS = np.asarray(GREY)


def in_mode(mode: str) -> Image.Image:
    """The picture in a mode, which holds its colours or its greys."""
    if mode == "LAB":
        profiles = (ImageCms.createProfile(name) for name in ("sRGB", "LAB"))
        found = ImageCms.profileToProfile(PICTURE, *profiles, outputMode="LAB")
        assert found is not None
        return found
    if mode.startswith("I;16"):
        order = ">u2" if mode.endswith("B") else "<u2"
        return Image.frombytes(mode, GREY.size, (GREYS.astype(np.uint16) * 257).astype(order).tobytes())
    through = {"PA": "LA", "La": "LA", "RGBa": "RGBA"}.get(mode)
    return (PICTURE.convert(through) if through else PICTURE).convert(mode)


def saved(picture: Image.Image, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


def tiff(values: np.ndarray, *, bits: int, photometric: int = 1, sample_format: int = 1) -> bytes:
    """A grey TIFF of one strip; Pillow writes neither 12 bits nor white as 0."""
    if bits == 12:
        first, second = values.reshape(-1, 2).astype(np.uint32).T
        data = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1).astype(np.uint8).tobytes()
    else:
        data = values.astype(f"<{'i' if sample_format == 2 else 'u'}{bits // 8}").tobytes()
    height, width = values.shape
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 0, 277: 1, 278: height, 279: len(data)}
    tags[339] = sample_format
    tags[273] = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0) + data


# ---- modes


WRITTEN = {
    "RGB": ("PNG", "TIFF"),
    "RGBA": ("PNG", "TIFF", "JPEG2000"),
    "RGBX": ("TIFF",),
    "RGBa": (),
    "CMYK": ("TIFF",),
    "YCbCr": ("TIFF", "JPEG2000"),
    "HSV": (),
    "L": ("PNG", "TIFF", "JPEG2000"),
    "LA": ("PNG", "TIFF", "JPEG2000"),
    "La": (),
    "PA": ("TIFF",),
    "I;16": ("PNG", "TIFF", "JPEG2000"),
    "I;16B": ("PNG", "TIFF", "JPEG2000"),
    "I;16L": ("TIFF",),
    "I;16N": (),
}
"""The formats without loss that Pillow writes each mode to."""


def decoded(mode: str) -> list[Image.Image]:
    """The picture in a mode, from memory and from each format."""
    picture = in_mode(mode)
    from_files = [decode_bytes(saved(picture, form), form) for form in WRITTEN[mode]]
    return [decode_picture(picture, "memory"), *from_files]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV"])
def test_colours_stay_what_they_are(mode):
    for found in decoded(mode):
        assert found.mode == "RGB"
        assert np.abs(np.asarray(found, np.int16) - np.asarray(PICTURE, np.int16)).mean() < 2


@pytest.mark.parametrize("mode", ["L", "LA", "La", "PA", "I;16", "I;16B", "I;16L", "I;16N"])
def test_greys_stay_what_they_are(mode):
    for found in decoded(mode):
        grey = np.asarray(found if found.mode == "L" else found.convert("L"))
        np.testing.assert_array_equal(grey, GREYS)


def test_black_and_white_is_0_and_255():
    picture = PICTURE.convert("1")
    for source in (picture, *(saved(picture, form) for form in ("PNG", "TIFF", "BMP", "PPM"))):
        found = decode_picture(source, "") if isinstance(source, Image.Image) else decode_bytes(source, "")
        np.testing.assert_array_equal(np.asarray(found), np.asarray(picture) * np.uint8(255))


@pytest.mark.parametrize("transparency", [None, 3, bytes(range(256))], ids=["opaque", "one", "many"])
def test_a_palettes_colours_are_looked_up(transparency):
    options = {} if transparency is None else {"transparency": transparency}
    palette = PICTURE.convert("P")
    found = decode_bytes(saved(palette, "PNG", **options), "the image")
    np.testing.assert_array_equal(np.asarray(found), np.asarray(palette.convert("RGB")))


@pytest.mark.parametrize("mode", ["F", "LAB", "I"])
@pytest.mark.parametrize("form", [None, "TIFF"])
def test_values_without_a_known_white_are_refused_by_their_mode(mode, form):
    picture = in_mode(mode)
    with pytest.raises(ImageError, match=rf"the image: is of Pillow's mode '{mode}'.*Fix: "):
        decode_picture(picture, "the image") if form is None else decode_bytes(saved(picture, form), "the image")


def test_a_float_map_is_refused():
    pfm = b"Pf\n60 40\n-1.0\n" + (GREYS[::-1] / 255).astype("<f4").tobytes()
    with pytest.raises(ImageError, match="mode 'F'"):
        decode_bytes(pfm, "map.pfm")


@pytest.mark.parametrize("white", [255, 1023, 4095, 65535])
def test_the_white_of_a_pgm_is_its_largest_value(white):
    values = np.round(GREYS / 255 * white).astype(np.uint8 if white == 255 else ">u2")
    found = decode_bytes(b"P5\n60 40\n%d\n" % white + values.tobytes(), "image.pgm")
    assert np.abs(np.asarray(found, np.int16) - GREYS).max() <= 1


def test_a_tiff_of_12_bits_is_as_bright_as_one_of_8():
    found = decode_bytes(tiff(np.round(GREYS / 255 * 4095), bits=12), "image.tif")
    np.testing.assert_array_equal(np.asarray(found), GREYS)


@pytest.mark.parametrize("bits", [8, 16])
def test_a_tiff_whose_white_is_0_is_turned(bits):
    values = (2**bits - 1) - GREYS.astype(np.uint32) * (2**bits - 1) // 255
    np.testing.assert_array_equal(np.asarray(decode_bytes(tiff(values, bits=bits, photometric=0), "")), GREYS)


@pytest.mark.parametrize(("bits", "sample_format"), [(16, 2), (32, 1), (32, 2)])
def test_a_tiff_of_signed_or_32_bit_integers_is_refused(bits, sample_format):
    with pytest.raises(ImageError, match="whose white is not known"):
        decode_bytes(tiff(GREYS, bits=bits, sample_format=sample_format), "image.tif")


def test_48_bit_colours_keep_their_upper_bytes():
    ppm = b"P6\n60 40\n65535\n" + (np.asarray(PICTURE).astype(">u2") * 257).tobytes()
    np.testing.assert_array_equal(np.asarray(decode_bytes(ppm, "")), np.asarray(PICTURE))


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF"])
def test_an_animation_is_its_first_picture(form):
    frames = [PICTURE.convert("P") if form == "GIF" else PICTURE, Image.new("RGB", PICTURE.size, "red")]
    options = {"lossless": True} if form == "WEBP" else {}
    moving = decode_bytes(saved(frames[0], form, save_all=True, append_images=frames[1:], **options), "")
    still = decode_bytes(saved(frames[0], form, **options), "")
    np.testing.assert_array_equal(np.asarray(moving), np.asarray(still))


# ---- orientation


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_upright_once(orientation, form):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = saved(PICTURE, form, exif=exif, **({"quality": 100} if form in ("JPEG", "WEBP") else {}))
    turned = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE"}
    turned |= {6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90"}
    with Image.open(io.BytesIO(saved(PICTURE, form, **({"quality": 100} if form in ("JPEG", "WEBP") else {})))) as flat:
        flat.load()
        expected = flat.transpose(Image.Transpose[turned[orientation]]) if orientation > 1 else flat
    found = decode_bytes(content, "")
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))
    with Image.open(io.BytesIO(content)) as opened:
        size = opened.size
        np.testing.assert_array_equal(np.asarray(decode_picture(opened, "")), np.asarray(expected))
        assert opened.size == size or form == "TIFF"  # which Pillow turns when it loads
    np.testing.assert_array_equal(np.asarray(decode_picture(found, "")), np.asarray(expected))


# ---- formats


@pytest.mark.parametrize("name", ["drawing.eps", "drawing.jpg", "drawing"])
def test_postscript_is_never_interpreted(name, tmp_path, monkeypatch):
    def interpreted(*_: object, **__: object) -> None:
        raise AssertionError("PostScript was handed to an interpreter")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", interpreted)
    (tmp_path / name).write_bytes(saved(PICTURE, "EPS"))
    with pytest.raises(ImageError, match=rf"{name}: not an image that is read here: it is PostScript"):
        decode_file(tmp_path / name)
    with Image.open(tmp_path / name) as opened, pytest.raises(ImageError, match="opened from EPS"):
        decode_picture(opened, "the image")


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"%PDF-1.7\n", "PDF"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC"),
        (b"8BPS\0\1" + bytes(30), "Photoshop"),
        (b"\xd7\xcd\xc6\x9a" + bytes(40), "WMF"),
        (b"\0\0\0\x18ftypisom\0\0\0\0", "a video"),
        (b"\0\x05\x16\x07" + bytes(60), "a resource fork of macOS"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_formats_are_named(content, kind):
    with pytest.raises(ImageError, match=rf"not an image that is read here: it is {kind}.*JPEG.*Fix: convert"):
        decode_bytes(content, "image 3")


def test_an_empty_file_is_called_that():
    with pytest.raises(ImageError, match="image 3: not an image: it is empty"):
        decode_bytes(b"", "image 3")


def test_the_content_says_what_a_file_is_and_not_its_suffix(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(saved(PICTURE, "PNG"))
    (tmp_path / "photo").write_bytes(saved(PICTURE, "BMP"))
    for name in ("photo.jpg", "photo"):
        np.testing.assert_array_equal(np.asarray(decode_file(tmp_path / name)), np.asarray(PICTURE))


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "JPEG2000")),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), max_size=6),
    st.floats(0.01, 1),
)
def test_a_damaged_file_is_an_image_error_or_an_image(form, flips, keep):
    content = bytearray(saved(PICTURE.convert("P") if form == "GIF" else PICTURE, form))
    for place, change in flips:
        content[int(place * len(content))] ^= change
    try:
        found = decode_bytes(bytes(content[: int(keep * len(content)) + 1]), "image 3")
    except ImageError as error:
        assert str(error).startswith("image 3: ")
    else:
        assert found.mode in ("L", "RGB")


# ---- files that are none


@pytest.mark.parametrize("name", ["fifo.jpg", "fifo.npy"])
def test_a_fifo_is_refused_without_waiting(name, tmp_path):
    os.mkfifo(tmp_path / name)
    with pytest.raises(ImageError, match=rf"{name}: is a named pipe; expected an image file"):
        decode_file(tmp_path / name)


@pytest.mark.parametrize(("path", "kind"), [("/dev/zero", "a device"), ("/", "a folder")])
def test_devices_and_folders_are_refused(path, kind):
    with pytest.raises(ImageError, match=f"is {kind}"):
        preprocess(path, SPEC)


def test_a_broken_link_says_where_it_leads(tmp_path):
    (tmp_path / "photo.jpg").symlink_to(tmp_path / "gone.jpg")
    with pytest.raises(ImageError, match=r"photo\.jpg: no such file\. It is a link to .*gone\.jpg"):
        decode_file(tmp_path / "photo.jpg")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    with pytest.raises(ImageError, match=r"loop\.jpg: cannot be opened"):
        decode_file(tmp_path / "loop.jpg")


def test_a_name_that_is_no_text_is_read_and_shown(tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9\n.png"
    PICTURE.save(os.fsdecode(path), "PNG")
    assert preprocess(os.fsdecode(path), SPEC).shape == (1, 3, 16, 16)
    assert shown(os.fsdecode(path)).endswith(r"caf\xe9\n.png")
    with pytest.raises(ImageError, match=r"gone\\xff\.png: no such file"):
        preprocess(os.fsdecode(os.fsencode(tmp_path) + b"/gone\xff.png"), SPEC)


def test_an_image_error_is_both_a_wrong_input_and_a_calibration_error():
    assert issubclass(ImageError, SpecError)
    assert issubclass(ImageError, CalibrationError)


# ---- memory


def test_a_jpeg_larger_than_the_limit_is_decoded_at_half_its_size(monkeypatch):
    large = PICTURE.resize((600, 400), Image.Resampling.BICUBIC)
    content = saved(large, "JPEG", quality=95)
    whole = decode_bytes(content, "")
    monkeypatch.setattr(decode, "MOST_FULL_PIXELS", 600 * 400 - 1)
    half = decode_bytes(content, "")
    assert (whole.size, half.size) == ((600, 400), (300, 200))
    reduced = np.asarray(whole.resize((300, 200), Image.Resampling.BOX), np.int16)
    assert np.abs(np.asarray(half, np.int16) - reduced).mean() < 3
    with Image.open(io.BytesIO(content)) as opened:
        assert decode_picture(opened, "").size == (600, 400)  # the caller's own picture is not changed


@pytest.mark.parametrize(
    ("size", "mode"),
    [
        ((1, 2_000_000), "RGB"),
        ((2_000_000, 1), "RGB"),
        ((3, 700_000), "L"),
        ((12_000, 7_000), "L"),
        ((9_000, 8_000), "1"),
    ],
    ids=str,
)
def test_a_thin_or_large_image_takes_a_few_hundred_megabytes(size, mode, tmp_path):
    Image.new(mode, size, 1).save(tmp_path / "image.png", compress_level=1)
    code = f"""
        import resource, sys
        from dataclasses import replace
        from deploykit.images.preprocess import preprocess
        from deploykit.spec import InputSpec
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for crop_mode in ("center", "squash", "border"):
            spec = InputSpec()
            spec = replace(spec, preprocessing=replace(spec.preprocessing, crop_mode=crop_mode))
            assert preprocess({str(tmp_path / "image.png")!r}, spec).shape == (1, 3, 224, 224)
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True, timeout=120
    )
    assert float(done.stdout) < 250


# ---- the faster decoder


JPEGS = {
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "4:2:0": {"subsampling": 2},
    "progressive": {"progressive": True},
    "low quality": {"quality": 10},
}


@pytest.fixture
def pillow_alone(monkeypatch):
    """Decode as where simplejpeg is not installed."""
    return lambda: monkeypatch.setattr(decode, "_jpeg_decoder", lambda: None)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("form", JPEGS)
def test_the_faster_decoder_gives_pillows_pixels(form, mode, pillow_alone):
    pytest.importorskip("simplejpeg", reason="simplejpeg is not installed")
    content = saved(PICTURE.resize((131, 77)).convert(mode), "JPEG", **JPEGS[form])
    with Image.open(io.BytesIO(content)) as opened:
        assert (decode._decoded_jpeg(opened, io.BytesIO(content)) is None) == (mode == "CMYK")
    found = decode_bytes(content, "")
    pillow_alone()
    expected = decode_bytes(content, "")
    assert found.mode == expected.mode
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


def test_what_the_faster_decoder_finds_fault_with_is_left_to_pillow(pillow_alone):
    pytest.importorskip("simplejpeg", reason="simplejpeg is not installed")
    content = saved(PICTURE.resize((131, 77)), "JPEG")
    with pytest.raises(ImageError) as found:
        decode_bytes(content[: len(content) // 2], "half")
    pillow_alone()
    with pytest.raises(ImageError) as expected:
        decode_bytes(content[: len(content) // 2], "half")
    assert str(found.value) == str(expected.value)


def test_a_large_jpeg_is_not_held_twice(monkeypatch):
    monkeypatch.setattr(decode, "MOST_COPIED_PIXELS", 10)
    monkeypatch.setattr(decode, "_jpeg_decoder", lambda: pytest.fail)
    assert decode_bytes(saved(PICTURE, "JPEG"), "").size == PICTURE.size
