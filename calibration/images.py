"""A calibration set from whatever the user has: a folder, files, arrays, an iterable of batches."""

from __future__ import annotations

import hashlib
import itertools
import mmap
import os
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TypeAlias, cast

import numpy as np

from deploykit.arrays import Array, FloatArray, ImageArray
from deploykit.backends.input_checks import check_images
from deploykit.calibration.spooled_batches import spool, to_array
from deploykit.errors import CalibrationError, SpecError
from deploykit.images.decode import open_image, shown
from deploykit.images.find import IMAGE_SUFFIXES, FoundImages, LeftOut, describe_left_out, find_images
from deploykit.images.preprocess import PathLike, normalize, read_image
from deploykit.plain_files import digest_of
from deploykit.spec import InputSpec

ARRAY_SUFFIXES = (".npy", ".npz")
ROWS_MAPPED = 16
"""How many images of a mapped file are in memory at most."""

CalibrationSource: TypeAlias = "PathLike | Sequence[PathLike] | Array | Iterable[object] | CalibrationSet"


@dataclass(frozen=True, kw_only=True)
class CalibrationSet:
    """Images to calibrate with, read again on every pass and never all in memory at once.

    Either ``files`` (decoded and preprocessed by ``spec``) or ``arrays``, memory-mapped where they
    came from a file: ``(N, C, H, W)`` float32, normalised as the network expects, or ``(N, H, W, C)``
    uint8 pixels. What it gives is always what the network inside an engine takes. ``left_out`` is what the
    folders hold beside ``files``, each with the reason.
    """

    spec: InputSpec
    files: tuple[Path, ...] = ()
    arrays: ImageArray | None = None
    skip_corrupt: bool = False
    left_out: tuple[LeftOut, ...] = ()

    def surprises(self) -> tuple[str, ...]:
        """Say in one message what the folders hold that may have been meant as images; nothing where nothing does."""
        surprising = tuple(each for each in self.left_out if not each.expected)
        return (describe_left_out(surprising),) if surprising else ()

    def __len__(self) -> int:
        return len(self.files) if self.arrays is None else len(self.arrays)

    def images(self, skip: int = 0) -> Iterator[FloatArray]:
        """Yield each image as ``(C, H, W)`` float32, normalised, without the first ``skip``.

        Raises:
            CalibrationError: a corrupt file, unless ``skip_corrupt``, which warns; or none left.
        """
        if self.arrays is not None:
            for position, image in enumerate(_rows(self.arrays, skip), start=skip):
                yield _checked(image[None], self.spec, f"image {position}")[0]
            return
        if self.skip_corrupt:  # which files are among the first is known only once they are read
            yield from itertools.islice(self._decoded(self.files), skip, None)
        else:
            yield from self._decoded(self.files[skip:])

    def _decoded(self, files: tuple[Path, ...]) -> Iterator[FloatArray]:
        read = 0
        for path in files:
            try:
                image = read_image(path, self.spec.as_images())
            except CalibrationError as error:
                if not self.skip_corrupt:
                    raise CalibrationError(self._every_problem(error, path)) from error
                warnings.warn(f"left out of calibration: {error}", stacklevel=2)
                continue
            read += 1
            yield np.asarray(image, np.float32)  # of a spec without embedded preprocessing
        if files and not read:
            raise CalibrationError(f"none of the {len(self.files)} calibration files could be read.")

    def _every_problem(self, first: CalibrationError, path: Path) -> str:
        """Return the message for all unreadable files, when the first one has been met."""
        problems = [str(first)]
        for later in self.files[self.files.index(path) + 1 :]:
            try:
                read_image(later, self.spec)
            except CalibrationError as error:
                problems.append(str(error))
        return "\n".join([*problems, "To leave such files out, pass skip_corrupt=True."])

    def batches(self, size: int, *, skip: int = 0) -> Iterator[FloatArray]:
        """Batches of exactly ``size`` images, without the first ``skip`` batches.

        A last partial batch is filled up by repeating its images.
        """
        pending: list[FloatArray] = []
        for image in self.images(skip * size):
            pending.append(image)
            if len(pending) == size:
                yield np.stack(pending)
                pending = []
        if pending:
            yield np.stack([pending[index % len(pending)] for index in range(size)])

    def batch_at(self, number: int, size: int) -> FloatArray:
        """Return the batch of that number, from 0, of those that `batches` gives of a set without unreadable images."""
        positions = range(number * size, min((number + 1) * size, len(self)))
        if self.arrays is not None:
            part = replace(self, arrays=np.asarray(self.arrays[positions.start : positions.stop]))
        else:
            part = replace(self, files=self.files[positions.start : positions.stop])
        return next(part.batches(size))

    def sample(self, count: int) -> FloatArray:
        """Up to ``count`` images, evenly spaced over the set, ``(N, C, H, W)``."""
        positions = {int(position) for position in np.linspace(0, len(self) - 1, min(count, len(self)))}
        if self.arrays is not None:
            chosen = np.asarray(self.arrays)[sorted(positions)]
            return np.concatenate([_checked(image[None], self.spec, "an image") for image in chosen])
        chosen_files = tuple(self.files[position] for position in sorted(positions))
        subset = CalibrationSet(spec=self.spec, files=chosen_files, skip_corrupt=self.skip_corrupt)
        return np.stack(list(subset.images()))

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the content of the images and the preprocessing."""
        digest = hashlib.sha256(repr(self.spec.preprocessing).encode())
        digest.update(repr(self.spec.shape_at(1)[1:]).encode())
        if self.arrays is not None:
            for image in _rows(self.arrays):
                digest.update(np.ascontiguousarray(image).tobytes())
        for path in self.files:
            try:
                digest.update(bytes.fromhex(_file_digest(path)))
            except CalibrationError:
                if not self.skip_corrupt:
                    raise
                digest.update(b"left out")
        return digest.hexdigest()


def calibration_set(source: CalibrationSource, spec: InputSpec, *, skip_corrupt: bool = False) -> CalibrationSet:
    """Whatever the user has, as a `CalibrationSet`.

    Args:
        source: a folder (searched recursively), an image file, a list of files, a ``.npy`` or
            ``.npz`` file, an array ``(N, C, H, W)``, an iterable of such arrays or torch tensors
            (or of tuples that start with one, as a DataLoader gives) or of paths, or a `CalibrationSet`.
        spec: the model's input; a range of sizes is calibrated at its best size. Where it embeds the preprocessing,
            arrays may also be pixels ``(N, H, W, C)`` uint8, which are normalised on the way in.
        skip_corrupt: leave unreadable image files out with a warning instead of raising.

    Raises:
        CalibrationError: nothing to read, or something that cannot be read.
    """
    spec = spec.at((spec.height, spec.width))  # of a range, the best size alone
    if isinstance(source, CalibrationSet):
        return _made_for(source, spec)
    if isinstance(source, (str, os.PathLike)):
        if not os.fspath(source):
            raise CalibrationError("calibration is an empty text; expected the path of a folder or a file.")
        path = Path(source)
        if path.suffix.lower() in ARRAY_SUFFIXES:
            return _from_arrays(_load_array(path), spec, shown(path))
        return _from_files([path], spec, skip_corrupt=skip_corrupt)
    if (isinstance(source, np.ndarray) and source.dtype.kind not in "OU") or hasattr(source, "detach"):
        return _from_arrays(to_array(source, "calibration"), spec, "the array")
    if not isinstance(source, Iterable) or isinstance(source, (bytes, Mapping)):
        raise CalibrationError(
            f"calibration is a {type(source).__name__}; expected a folder, files, an array or an iterable of batches."
        )
    items = iter(sorted(source, key=str) if isinstance(source, (set, frozenset)) else source)
    head = list(itertools.islice(items, 1))
    if head and isinstance(head[0], (str, os.PathLike)):
        return _from_files(_paths([*head, *items]), spec, skip_corrupt=skip_corrupt)
    dtypes = ("float32", "uint8") if spec.embeds_preprocessing else ("float32",)
    return _from_arrays(spool(itertools.chain(head, items), dtypes), spec, "the iterable")


def _paths(items: list[object]) -> list[Path]:
    """Return the paths of image files and folders.

    Raises:
        CalibrationError: one is no path, an empty one, or that of arrays.
    """
    paths = [Path(item) for item in items if isinstance(item, (str, os.PathLike)) and os.fspath(item)]
    if len(paths) < len(items):
        other = next(item for item in items if not isinstance(item, (str, os.PathLike)) or not os.fspath(item))
        raise CalibrationError(
            f"calibration has paths and a {type(other).__name__} ({str(other)[:40]!r}); expected paths alone, or "
            "batches alone."
        )
    if arrays := [path for path in paths if path.suffix.lower() in ARRAY_SUFFIXES]:
        raise CalibrationError(
            f"{shown(arrays[0])} is a file of arrays in a list; expected image files and folders there. Fix: give the "
            "file by itself, or (numpy.load(path) for path in paths)."
        )
    return paths


def _made_for(source: CalibrationSet, spec: InputSpec) -> CalibrationSet:
    made, wanted = ((each.as_images().shape_at(1)[1:], each.preprocessing) for each in (source.spec, spec))
    if made != wanted:
        raise CalibrationError(
            f"the calibration set was made for {made[0]} with {made[1]}; the model takes {wanted[0]} with {wanted[1]}. "
            "Make it with the model's own input_spec."
        )
    return source


def _from_files(paths: list[Path], spec: InputSpec, *, skip_corrupt: bool) -> CalibrationSet:
    """Files as they are, and the images below each folder."""
    found = [_images_at(path) for path in paths]
    return CalibrationSet(
        spec=spec.as_images(),
        files=tuple(file for each in found for file in each.files),
        skip_corrupt=skip_corrupt,
        left_out=tuple(one for each in found for one in each.left_out),
    )


def _images_at(path: Path) -> FoundImages:
    try:
        is_folder = path.is_dir()
        exists = is_folder or path.is_symlink() or path.exists()
    except (OSError, ValueError) as error:
        raise CalibrationError(f"{shown(path)}: cannot be opened ({error}). Fix: check the path.") from error
    if not exists:
        raise CalibrationError(f"{shown(path)}: no such file or folder. Give a folder of images to calibrate with.")
    if not is_folder:
        return FoundImages(files=(path,), left_out=())
    found = find_images(path)
    if not found.files:
        raise CalibrationError(
            f"{shown(path)}: no image files in the folder ({len(found.left_out)} other files). "
            f"Expected {', '.join(sorted(IMAGE_SUFFIXES))}."
        )
    return found


def _load_array(path: Path) -> Array:
    open_image(path).close()
    try:
        if path.suffix.lower() == ".npy":
            loaded: Array = np.load(path, mmap_mode="r", allow_pickle=False)
            return loaded
        # NumPy leaves a file open that it opened itself and cannot read.
        with open_image(path) as file, np.load(file, allow_pickle=False) as archive:
            names = list(archive.files)
            if len(names) != 1:
                raise CalibrationError(f"{path}: holds the arrays {names}; expected exactly one.")
            array: Array = archive[names[0]]
            return array
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise CalibrationError(f"{path}: not a readable NumPy file without pickles ({error}).") from error


def _from_arrays(arrays: Array, spec: InputSpec, name: str) -> CalibrationSet:
    taken = (spec.as_images(), spec.as_pixels()) if spec.embeds_preprocessing else (spec,)
    if not any(arrays.dtype == each.dtype and arrays.shape[1:] == each.shape[1:] for each in taken):
        raise CalibrationError(
            f"{name} is {arrays.shape} {arrays.dtype}; calibration arrays are what the model is called with: "
            f"{_what_is_taken(spec)}."
        )
    if not len(arrays):
        raise CalibrationError(f"{name} holds no images; expected at least one.")
    return CalibrationSet(spec=spec.as_images(), arrays=cast("ImageArray", arrays))  # of one of the dtypes above


def _what_is_taken(spec: InputSpec) -> str:
    floats = f"(N, {spec.channels}, {spec.height}, {spec.width}) float32, normalised"
    pixels = f"(N, {spec.height}, {spec.width}, {spec.channels}) uint8, from 0 to 255"
    return f"{pixels}, or {floats}" if spec.embeds_preprocessing else floats


def _checked(image: ImageArray, spec: InputSpec, name: str) -> FloatArray:
    """Return one image of an array, ``(1, C, H, W)`` or ``(1, H, W, C)`` pixels, as the network takes it."""
    single = replace(spec, batch=1)
    if image.dtype == np.uint8:
        return normalize(check_images(image, single.as_pixels()), spec.preprocessing)
    try:
        return np.asarray(check_images(image, single), np.float32)
    except SpecError as error:
        raise CalibrationError(f"{name} of the calibration set cannot be used: {error}") from error


def _rows(arrays: ImageArray, skip: int = 0) -> Iterator[ImageArray]:
    """Yield each image of an array, one alive at a time where it is mapped from a file.

    A mapped file's pages count as this process's memory until they are given back.
    """
    base: object = arrays.base
    mapped = base if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED") else None
    for position in range(skip, len(arrays)):
        yield np.array(arrays[position]) if mapped is not None else np.asarray(arrays[position])
        if mapped is not None and position % ROWS_MAPPED == ROWS_MAPPED - 1:
            mapped.madvise(mmap.MADV_DONTNEED)


def _file_digest(path: Path) -> str:
    with open_image(path) as file:
        try:
            return digest_of(file)
        except OSError as error:
            raise CalibrationError(f"{shown(path)}: cannot be read ({error.strerror}).") from error
