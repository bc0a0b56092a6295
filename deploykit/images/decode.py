"""Decode an image, from a file or from memory, into an upright picture of 8 bits a channel, grey or RGB.

Formats are told by content and limited to `FORMATS`: Pillow hands PostScript to an interpreter. Only the first
picture of an animation is read, and alpha is dropped, both as timm and torchvision do.
"""

from __future__ import annotations

import importlib
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from deploykit.errors import ImageError, plain_reason
from deploykit.plain_files import NotPlainFile, open_plain

FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""Pillow's names of the formats that are read, as far as the installed Pillow has them."""
INTERPRETED = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "WMF"})
"""Formats that Pillow gives to another program or library when their pixels are asked for."""
MOST_FULL_PIXELS = 2**26
"""A larger JPEG is decoded at half its size, which bounds the memory."""
MOST_COPIED_PIXELS = 2**24
"""A larger JPEG is left to Pillow, which holds its pixels once."""
_JPEG_COLOURS = {"RGB": "RGB", "L": "GRAY"}
REMEDY = "Fix: remove or replace the file."

_SIGNATURES: tuple[tuple[int, bytes, str, bool], ...] = (
    (0, b"\xff\xd8\xff", "JPEG", True),
    (0, b"\x89PNG\r\n\x1a\n", "PNG", True),
    (0, b"GIF8", "GIF", True),
    (0, b"II*\0", "TIFF", True),
    (0, b"MM\0*", "TIFF", True),
    (8, b"WEBP", "WebP", True),
    (0, b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000", True),
    (4, b"ftypavif", "AVIF", True),
    (4, b"ftypheic", "HEIC", False),
    (4, b"ftypheix", "HEIC", False),
    (4, b"ftypmif1", "HEIF", False),
    (4, b"ftypmsf1", "HEIF", False),
    (4, b"ftyp", "a video", False),
    (0, b"%!PS", "PostScript", False),
    (0, b"\xc5\xd0\xd3\xc6", "PostScript", False),
    (0, b"%PDF", "PDF", False),
    (0, b"8BPS", "Photoshop", False),
    (0, b"<svg", "SVG", False),
    (0, b"<?xml", "XML or SVG", False),
    (0, b"\xd7\xcd\xc6\x9a", "WMF", False),
    (0, b"\0\x05\x16\x07", "a resource fork of macOS", False),
)
"""Where the content of a file begins with what, the name of its format, and whether it is among `FORMATS`."""


def shown(path: str | os.PathLike[str]) -> str:
    """A path as text that every terminal and JSON can take: bytes that are no UTF-8 and control characters escaped."""
    return "".join(each if each.isprintable() else _escaped(each) for each in os.fspath(path))


def _escaped(character: str) -> str:
    number = ord(character)
    is_byte = 0xDC80 <= number <= 0xDCFF  # how Python keeps a byte of a name that is no UTF-8
    return f"\\x{number - 0xDC00:02x}" if is_byte else character.encode("unicode_escape").decode()


def kind_of_content(prefix: bytes) -> tuple[str, bool]:
    """Return the format that a file's first 16 bytes are of, empty where unknown, and whether it is one of `FORMATS`.

    Formats whose signature may begin a text (BMP, PPM) are left to Pillow.
    """
    for start, signature, name, is_read in _SIGNATURES:
        if prefix[start : start + len(signature)] == signature:
            return name, is_read
    return "", False


def open_image(path: Path) -> BinaryIO:
    """Open an image file, also behind a link, and never wait for what is no file.

    Raises:
        ImageError: it is missing, unreadable, or a folder, named pipe, device or socket.
    """
    try:
        return open_plain(path, follow=True)
    except NotPlainFile as error:
        raise ImageError(f"{shown(path)}: is {error.kind}; expected an image file.") from error
    except FileNotFoundError as error:
        target = f" It is a link to {shown(path.readlink())}." if path.is_symlink() else ""
        raise ImageError(f"{shown(path)}: no such file.{target}") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or plain_reason(error)
        raise ImageError(f"{shown(path)}: cannot be opened ({reason}). {REMEDY}") from error


def decode_file(path: Path) -> Image.Image:
    """Decode an image file; see the module.

    Raises:
        ImageError: it is missing, unreadable, not an image, damaged, or of a mode whose values have no known white.
    """
    with open_image(path) as file:
        return _decode(file, shown(path))


def decode_bytes(content: bytes | bytearray | memoryview, name: str) -> Image.Image:
    """Decode the content of an image file; ``name`` is what messages call it.

    Raises:
        ImageError: as `decode_file`.
    """
    return _decode(io.BytesIO(bytes(content)), name)


def decode_picture(image: Image.Image, name: str) -> Image.Image:
    """Convert a picture of Pillow's, which stays as it is.

    Raises:
        ImageError: as `decode_file`; or it was opened from a format that Pillow leaves to an interpreter.
    """
    if image.format in INTERPRETED:
        raise ImageError(f"{name} was opened from {image.format}, which is not a raster format. Fix: give PNG or JPEG.")
    return _converted(image, name)


def _decode(file: IO[bytes], name: str) -> Image.Image:
    try:
        image = Image.open(file, formats=_installed_formats())
    except UnidentifiedImageError as error:
        raise ImageError(f"{name}: {_not_an_image(file)}") from error
    except MemoryError:
        raise
    except Exception as error:  # a damaged file makes Pillow's plugins raise what they like
        raise _undecodable(name, error) from error
    with image:
        if image.format in ("JPEG", "MPO") and image.width * image.height > MOST_FULL_PIXELS:
            image.draft(image.mode, (image.width // 2, image.height // 2))
            return _converted(image, name)
        return _converted(_decoded_jpeg(image, file) or image, name)


def _decoded_jpeg(image: Image.Image, file: IO[bytes]) -> Image.Image | None:
    """Decode a JPEG with simplejpeg, which gives Pillow's pixels two to four times as fast.

    None where it is not installed, or the picture is of another format, too large for a second copy of it, or one that
    simplejpeg finds fault with: Pillow says what is wrong with it.
    """
    decode_jpeg, colours = _jpeg_decoder(), _JPEG_COLOURS.get(image.mode)
    if decode_jpeg is None or image.format != "JPEG" or colours is None:
        return None
    if image.width * image.height > MOST_COPIED_PIXELS:
        return None
    file.seek(0)
    try:
        pixels = decode_jpeg(file.read(), colorspace=colours)
    except ValueError:
        return None
    decoded = Image.fromarray(pixels if colours == "RGB" else pixels[:, :, 0])
    decoded.info.update(image.info)  # the orientation is there
    return decoded


@cache
def _jpeg_decoder() -> Callable[..., npt.NDArray[np.uint8]] | None:
    """Return simplejpeg's decoder; None where the package is not installed, or does not import."""
    try:
        decode_jpeg: Callable[..., npt.NDArray[np.uint8]] = importlib.import_module("simplejpeg").decode_jpeg
    except (ImportError, OSError):
        return None
    return decode_jpeg


def _converted(image: Image.Image, name: str) -> Image.Image:
    try:
        image.load()
        depth = _depth(image)
        return _eight_bit(_upright(image), depth, name)
    except (MemoryError, ImageError):
        raise
    except Exception as error:  # as above
        raise _undecodable(name, error) from error


def _undecodable(name: str, error: Exception) -> ImageError:
    own = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
    reason = plain_reason(error) if isinstance(error, own) else f"{type(error).__name__}: {plain_reason(error)}"
    return ImageError(f"{name}: cannot be decoded ({reason}). {REMEDY}")


def _not_an_image(file: IO[bytes]) -> str:
    file.seek(0)
    prefix = file.read(32)
    if not prefix:
        return f"not an image: it is empty. {REMEDY}"
    kind, _ = kind_of_content(prefix)
    seen = f"not an image that is read here: it is {kind}" if kind else "not an image that Pillow can read"
    known = ", ".join(each for each in _installed_formats() if each != "DIB")
    return f"{seen}. Expected {known}. Fix: convert, remove or replace the file."


@cache
def _installed_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@dataclass(frozen=True, kw_only=True)
class _Depth:
    """How the values of one grey channel run: from 0 to ``white``, or down from it where ``inverted``."""

    white: int | None
    inverted: bool = False


def _depth(image: Image.Image) -> _Depth:
    """Return the depth of a picture in mode I or I;16; white is None where the file does not say it."""
    if image.format == "TIFF":
        tags: Any = image.tag_v2  # type: ignore[attr-defined]
        bits, signed = int(tags.get(258, (1,))[0]), 2 in tags.get(339, (1,))
        # Pillow turns 8-bit greys of which 0 is white, and leaves those of 16 bits as they are.
        return _Depth(white=None if signed or bits > 16 else 2**bits - 1, inverted=tags.get(262) == 0)
    known = image.mode.startswith("I;16") or image.format in ("PNG", "PPM")
    return _Depth(white=65535 if known else None)


def _upright(image: Image.Image) -> Image.Image:
    """Return the picture turned as its EXIF orientation says; a turned copy has no orientation any more."""
    if image.getexif().get(0x0112, 1) == 1:
        return image
    return ImageOps.exif_transpose(image)


def _eight_bit(image: Image.Image, depth: _Depth, name: str) -> Image.Image:
    mode = image.mode
    if mode in ("L", "RGB"):
        return image
    if mode == "1":
        return image.convert("L")
    if mode in ("LA", "La"):
        return image.convert("LA").convert("L")
    if mode == "I" or mode.startswith("I;16"):
        return _greys(image, depth, name)
    if mode in ("PA", "RGBa") or (mode == "P" and "transparency" in image.info):
        return image.convert("RGBA").convert("RGB")
    if mode in ("P", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"):
        return image.convert("RGB")
    what = {"F": "floats, whose white is not known", "LAB": "CIELAB colours"}.get(mode, "no 8-bit grey or RGB")
    raise ImageError(
        f"{name}: is of Pillow's mode {mode!r} ({what}). Fix: convert it to 8-bit grey or RGB, scaled to 0..255."
    )


def _greys(image: Image.Image, depth: _Depth, name: str) -> Image.Image:
    values = np.asarray(image)
    if depth.white is None or values.min() < 0 or values.max() > depth.white:
        raise ImageError(
            f"{name}: is of Pillow's mode {image.mode!r} with values {values.min()} to {values.max()}, whose white is "
            "not known. Fix: scale it to 8 bits (0..255), or save it as 16 bits without sign."
        )
    return Image.fromarray(_scaled_to_eight_bits(depth)[values])


def _scaled_to_eight_bits(depth: _Depth) -> npt.NDArray[np.uint8]:
    """Return the 8-bit grey of every value from 0 to white."""
    white = float(depth.white or 1)
    scaled = np.arange(white + 1, dtype=np.float32) / np.float32(white / 255)
    table = scaled.round().astype(np.uint8)
    return np.ascontiguousarray(table[::-1]) if depth.inverted else table
