"""Fashion-MNIST (Xiao et al. 2017): 60,000 grey images of ten kinds of clothing to train on, and 10,000 to test on.

Debian's package ``dataset-fashion-mnist`` carries it. Each file is gzip around IDX: two zeros, the type (8: uint8),
the number of sides, the sides as big-endian 32-bit integers, and then the values.
"""

from __future__ import annotations

import gzip
import io
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from deploykit.errors import ImageError, SpecError
from deploykit.plain_files import read_plain

FOLDER = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package puts the files."""
SIDE, CLASSES = 28, 10
TRAINING, TESTING = ("train", 60_000), ("t10k", 10_000)
MOST_PACKED_BYTES = 64 << 20

ByteArray = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Clothes:
    """Grey images ``(N, 28, 28)``, 0 to 255, and their classes ``(N,)``, 0 to 9."""

    images: ByteArray
    labels: npt.NDArray[np.int64]


def read_clothes(folder: Path = FOLDER) -> tuple[Clothes, Clothes]:
    """Return the images to train on and those to test on.

    Raises:
        SpecError: a file is not there; the message says how to get it.
        ImageError: a file is damaged, or holds something else.
    """
    training, testing = (_read_part(folder, *part) for part in (TRAINING, TESTING))
    return training, testing


def _read_part(folder: Path, name: str, count: int) -> Clothes:
    images = read_idx(folder / f"{name}-images-idx3-ubyte.gz", (count, SIDE, SIDE))
    path = folder / f"{name}-labels-idx1-ubyte.gz"
    labels = read_idx(path, (count,))
    if labels.max() >= CLASSES:
        raise ImageError(f"{path}: the class {labels.max()} is none of 0 to {CLASSES - 1}. {_remedy()}")
    return Clothes(images=images, labels=labels.astype(np.int64))


def read_idx(path: Path, shape: tuple[int, ...]) -> ByteArray:
    """Return the uint8 array of a packed IDX file that has to have this shape.

    Raises:
        SpecError: the file is not there, or cannot be read.
        ImageError: it is damaged, or holds another array.
    """
    try:
        packed = read_plain(path, MOST_PACKED_BYTES, follow=True)
    except (OSError, ValueError) as error:
        raise SpecError(f"{path} cannot be read ({error}). {_remedy()}") from error
    header = bytes((0, 0, 8, len(shape))) + np.array(shape, ">i4").tobytes()
    expected = len(header) + math.prod(shape)
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(packed)) as file:
            data = file.read(expected + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ImageError(f"{path} is damaged ({error}). {_remedy()}") from error
    if not data.startswith(header):
        raise ImageError(
            f"{path} begins with {data[: len(header)].hex()}; expected {header.hex()}, IDX of uint8 {shape}. "
            f"{_remedy()}"
        )
    if len(data) != expected:
        more = "more" if len(data) > expected else f"{len(data)}"
        raise ImageError(f"{path} holds {more} bytes; expected {expected}, IDX of uint8 {shape}. {_remedy()}")
    return np.frombuffer(data, np.uint8, offset=len(header)).reshape(shape)


def _remedy() -> str:
    return f"Fix: apt install dataset-fashion-mnist, or --data FOLDER with the four files as in {FOLDER}."
