"""Images with or without labels, read one at a time: a folder, a CSV file, a ``.npz`` file or arrays."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, cast

import numpy as np

from deploykit.arrays import Array, ImageArray
from deploykit.errors import ImageError, SpecError
from deploykit.images.decode import shown
from deploykit.images.find import IMAGE_SUFFIXES, NAMED, find_images
from deploykit.images.preprocess import decode, prepare_image, read_image
from deploykit.npz import read_npz, unpacked_limit
from deploykit.plain_files import read_plain
from deploykit.spec import InputSpec

IMAGE_COLUMNS = frozenset({"file", "filename", "image", "image_path", "img", "path"})
LABEL_COLUMNS = frozenset({"category", "class", "class_id", "class_name", "label", "target"})
"""The headings, in any case, by which the two columns of a CSV file are known; without a heading they are 1 and 2."""
IMAGE_ARRAYS = ("images", "x", "x_test", "test_images")
LABEL_ARRAYS = ("labels", "y", "y_test", "test_labels", "targets")
"""The names of the arrays of a ``.npz`` file, the first that is there."""
MOST_CSV_BYTES = 1 << 30

Label: TypeAlias = str | int
DatasetSource: TypeAlias = "str | os.PathLike[str] | Dataset | tuple[Array, object] | Array"


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Images in a fixed order, and the label of each where there are labels.

    Either ``files``, or ``arrays``: uint8 pixels ``(N, H, W, C)`` or ``(N, H, W)``, which are prepared as files are,
    or float32 ``(N, C, H, W)``, normalised, which the model takes as they are. ``labels`` are class names or indices,
    one an image; None: none are known, for the reason in ``unlabelled``. ``in_folders``: they are the names of the
    folders that the files lie in.
    """

    name: str
    files: tuple[Path, ...] = ()
    arrays: ImageArray | None = None
    labels: tuple[Label, ...] | None = None
    in_folders: bool = False
    unlabelled: str = "the source has no labels"

    def __len__(self) -> int:
        return len(self.files) if self.arrays is None else len(self.arrays)

    def name_of(self, position: int) -> str:
        """Return what messages and tables call an image: its path, or its position."""
        return shown(self.files[position]) if self.arrays is None else str(position)

    def read(self, position: int, spec: InputSpec) -> ImageArray:
        """Return one image as a model with this input takes it, without the batch.

        Raises:
            ImageError: it cannot be read.
            SpecError: an array that the model does not take.
        """
        if self.arrays is None:
            return read_image(self.files[position], spec)
        image = np.asarray(self.arrays[position])
        if image.dtype == np.uint8:
            return prepare_image(decode(image, f"image {position} of {self.name}"), spec)
        if spec.embeds_preprocessing or image.ndim != 3 or not spec.accepts_size((1, *image.shape)):
            raise SpecError(
                f"{self.name} holds images {image.shape} {image.dtype}, and the model takes {spec.shape[1:]} "
                f"{spec.dtype}. Give uint8 pixels (N, H, W, C), which are prepared for every model."
            )
        return image

    def chunks(self, size: int) -> Iterator[range]:
        """Yield the positions of the images, ``size`` at a time."""
        for start in range(0, len(self), size):
            yield range(start, min(start + size, len(self)))


def open_dataset(source: DatasetSource) -> Dataset:
    """Find the images of a source, and their labels; nothing is decoded yet.

    Args:
        source: a folder, in which a subfolder a class gives the labels; a ``.csv`` or ``.tsv`` file with a path and
            a label a row, relative to its folder; a ``.npz`` file with ``images`` and ``labels``; an image file; an
            array of images, or a pair of one and its labels.

    Raises:
        SpecError: not there, of another kind, without images, or with labels that do not fit the images.
    """
    if isinstance(source, Dataset):
        return source
    if isinstance(source, np.ndarray):
        return _from_arrays(source, None, "the array")
    if isinstance(source, tuple) and len(source) == 2:
        return _from_arrays(np.asarray(source[0]), source[1], "the array")
    if not isinstance(source, (str, os.PathLike)):
        raise SpecError(
            f"the images are a {type(source).__name__}; expected a folder, a .csv or .npz file, an array, or a pair "
            "(images, labels)."
        )
    if not os.fspath(source):
        raise SpecError("the images are an empty text; expected the path of a folder or a file.")
    path = Path(source)
    if not os.path.exists(path):  # noqa: PTH110  (pathlib raises for a name that no file can have)
        raise SpecError(f"{shown(path)}: no such file or folder. Give a folder of images, or a .csv or .npz file.")
    if path.is_dir():
        return _from_folder(path)
    readers = {".csv": _from_csv, ".tsv": _from_csv, ".npz": _from_npz}
    suffix = path.suffix.lower()
    if suffix in readers:
        return readers[suffix](path)
    if suffix in IMAGE_SUFFIXES:
        return Dataset(name=shown(path), files=(path,))
    raise SpecError(
        f"{shown(path)}: is of no kind that is read. Give a folder, a .csv, .tsv or .npz file, or an image."
    )


def _from_folder(folder: Path) -> Dataset:
    files = find_images(folder).files
    if not files:
        raise SpecError(f"{shown(folder)}: no image files in the folder. Expected {', '.join(sorted(IMAGE_SUFFIXES))}.")
    parts = [file.relative_to(folder).parts for file in files]
    outside = [file for file, names in zip(files, parts, strict=True) if len(names) < 2]
    if outside:
        reason = f"{len(outside)} of {len(files)} images lie in no class folder, such as {shown(outside[0])}"
        return Dataset(name=shown(folder), files=files, unlabelled=reason)
    return Dataset(name=shown(folder), files=files, labels=tuple(names[0] for names in parts), in_folders=True)


def _from_csv(path: Path) -> Dataset:
    name = shown(path)
    try:
        text = read_plain(path, MOST_CSV_BYTES, follow=True).decode("utf-8-sig")
        reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        rows = [[cell.strip() for cell in row] for row in reader if any(cell.strip() for cell in row)]
    except (OSError, ValueError, csv.Error) as error:
        raise SpecError(f"{name}: cannot be read as CSV in UTF-8 ({error}). Give a path and a label a row.") from error
    image_column, label_column, rows = _columns(rows, name)
    last = max(image_column, -1 if label_column is None else label_column)
    short = next((number for number, row in enumerate(rows, 1) if len(row) <= last), None)
    if not rows or short is not None:
        seen = "no rows" if not rows else f"row {short} of the images has {len(rows[short - 1])} columns"  # type: ignore[operator]
        raise SpecError(f"{name}: {seen}; expected a path and a label in each row.")
    files = tuple(path.parent / row[image_column] for row in rows)
    missing = [shown(file) for file in files if not file.is_file()]
    if missing:
        more = f", and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
        raise SpecError(
            f"{name} names {len(missing)} files that are not there: {', '.join(missing[:NAMED])}{more}. Paths are "
            f"relative to {shown(path.parent)}."
        )
    if label_column is None:
        return Dataset(name=name, files=files, unlabelled=f"{name} has no column of labels")
    blank = [shown(file) for file, row in zip(files, rows, strict=True) if not row[label_column]]
    if blank:
        raise SpecError(
            f"{name}: {len(blank)} of its {len(rows)} images have an empty label, such as {', '.join(blank[:NAMED])}; "
            "expected one in each row. Fix: fill it in, or take the row out."
        )
    return Dataset(name=name, files=files, labels=_typed([row[label_column] for row in rows]))


def _columns(rows: list[list[str]], name: str) -> tuple[int, int | None, list[list[str]]]:
    """Return the column of paths, that of labels (None: there is none), and the rows without the heading."""
    heading = [cell.lower() for cell in rows[0]] if rows else []
    images = [column for column, cell in enumerate(heading) if cell in IMAGE_COLUMNS]
    labels = [column for column, cell in enumerate(heading) if cell in LABEL_COLUMNS]
    if images:
        return images[0], labels[0] if labels else None, rows[1:]
    if len(heading) > 2:
        raise SpecError(
            f"{name}: its first row is {', '.join(rows[0][:8])}; with more than two columns it has to name them: "
            f"one of {', '.join(sorted(IMAGE_COLUMNS))}, and one of {', '.join(sorted(LABEL_COLUMNS))}."
        )
    return 0, 1 if len(heading) == 2 else None, rows


def _typed(labels: Sequence[str]) -> tuple[Label, ...]:
    """Return labels as indices where all of them are whole numbers, as names otherwise."""
    if all(label.isascii() and label.isdecimal() for label in labels):
        return tuple(int(label) for label in labels)
    return tuple(labels)


def _from_npz(path: Path) -> Dataset:
    name = shown(path)
    try:
        arrays = read_npz(path, limit=unpacked_limit(path.stat().st_size))
    except (OSError, ValueError) as error:
        raise SpecError(f"{name}: cannot be read ({error}). Give a .npz file of plain arrays.") from error
    images = next((arrays[key] for key in IMAGE_ARRAYS if key in arrays), None)
    labels = next((arrays[key] for key in LABEL_ARRAYS if key in arrays), None)
    if images is None:
        raise SpecError(f"{name}: holds the arrays {', '.join(arrays) or 'none'}; expected 'images', and 'labels'.")
    return _from_arrays(images, labels, name)


def _from_arrays(images: Array, labels: object, name: str) -> Dataset:
    is_pixels = images.dtype == np.uint8 and images.ndim in (3, 4)
    if not (is_pixels or (images.dtype == np.float32 and images.ndim == 4)) or not len(images):
        raise SpecError(
            f"{name}: the images are {images.shape} {images.dtype}; expected pixels (N, H, W, C) or (N, H, W) in "
            "uint8, or normalised images (N, C, H, W) in float32, at least one."
        )
    arrays = cast("ImageArray", images)  # of one of the dtypes above
    if labels is None:
        return Dataset(name=name, arrays=arrays)
    found = np.asarray(labels)
    if found.dtype.kind not in "iuU" or found.reshape(-1).shape != (len(images),):
        raise SpecError(
            f"{name}: the labels are {found.shape} {found.dtype} for {len(images)} images; expected one class index, "
            "or name, an image."
        )
    return Dataset(name=name, arrays=arrays, labels=tuple(found.reshape(-1).tolist()))


def read_images(
    dataset: Dataset, positions: range, spec: InputSpec, *, skip_corrupt: bool
) -> tuple[list[int], ImageArray | None, list[str]]:
    """Read some images of a dataset as one batch.

    Returns:
        The positions that were read, their images (None where none was), and the reason for each other.

    Raises:
        ImageError: images cannot be read, and ``skip_corrupt`` is off; each one is named.
    """
    images: list[ImageArray] = []
    read: list[int] = []
    problems: list[str] = []
    for position in positions:
        try:
            images.append(dataset.read(position, spec))
        except ImageError as error:
            problems.append(str(error))
        else:
            read.append(position)
    if problems and not skip_corrupt:
        raise ImageError("\n".join([*problems, "To go on past such files, pass skip_corrupt=True."]))
    return read, np.stack(images) if images else None, problems
