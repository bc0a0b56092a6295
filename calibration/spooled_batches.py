"""Write an iterable of batches to disk: it can be read once, and calibration reads its images several times."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from deploykit.arrays import Array, ImageArray
from deploykit.errors import CalibrationError
from deploykit.places import scratch_folder

MOST_IMAGES = 100_000
"""How many images an iterable may give: one without an end would fill the disk."""


def spool(batches: Iterable[object], dtypes: tuple[str, ...]) -> ImageArray:
    """Return the images of all batches as one array that is mapped from disk.

    Args:
        batches: arrays or torch tensors ``(N, C, H, W)``, or tuples that start with one.
        dtypes: those that a batch may have; ``uint8`` is for ``(N, H, W, C)`` pixels.

    Raises:
        CalibrationError: something else than such a batch, batches of different sizes, none, or more than
            `MOST_IMAGES` images or than the disk holds.
    """
    shape: tuple[int, ...] | None = None
    dtype: np.dtype[np.generic] | None = None
    count = 0
    with scratch_folder("calibration") as folder, (folder / "images").open("wb") as file:
        for batch in batches:
            array = to_array(batch, "a batch of the iterable")
            alike = shape is None or (array.shape[1:] == shape and array.dtype == dtype)
            if array.ndim != 4 or array.dtype not in dtypes or not alike:
                raise CalibrationError(
                    f"a batch of the iterable is {array.shape} {array.dtype}; expected {_layouts(dtypes)}, all of one "
                    "size."
                )
            shape, dtype = array.shape[1:], array.dtype
            count += len(array)
            if count > MOST_IMAGES:
                raise CalibrationError(
                    f"the iterable gave more than {MOST_IMAGES} images; expected one with an end. Fix: give a part of "
                    "it (itertools.islice): a few hundred images are enough."
                )
            try:
                file.write(np.ascontiguousarray(array).tobytes())
                file.flush()
            except OSError as error:
                raise CalibrationError(
                    f"{count} images of the iterable cannot be kept in {folder}: {error.strerror}. Fix: give fewer, "
                    "or set TMPDIR to a disk with more room."
                ) from error
        if shape is None or dtype is None:
            raise CalibrationError("the iterable gave no batches; expected at least one.")
        # The mapping keeps the unlinked file alive until the array is dropped.
        return np.memmap(file.name, dtype, "r", shape=(count, *shape))


def to_array(batch: object, name: str) -> Array:
    """Return an array, a torch tensor, or the first of a tuple of them, as an array.

    Raises:
        CalibrationError: a mapping, an object that is no array, or a tensor of a type that NumPy lacks.
    """
    if isinstance(batch, (tuple, list)) and batch:
        batch = batch[0]
    if isinstance(batch, Mapping):
        key = next((each for each in batch if hasattr(batch[each], "shape")), "image")
        raise CalibrationError(
            f"{name} is a {type(batch).__name__} with the keys {', '.join(map(str, batch))}; expected the images "
            f"alone. Fix: give (batch[{key!r}] for batch in loader)."
        )
    if hasattr(batch, "detach"):
        try:
            batch = batch.detach().cpu().numpy()
        except TypeError as error:  # a type of torch's own, such as bfloat16
            kind = str(getattr(batch, "dtype", type(batch).__name__)).removeprefix("torch.")
            raise CalibrationError(f"{name} is of {kind}; expected float32. Fix: give tensor.float().") from error
    array = np.asarray(batch)
    if array.dtype.kind in "OUS":
        raise CalibrationError(f"{name} is a {type(batch).__name__}; expected an array of images.")
    return array


def _layouts(dtypes: tuple[str, ...]) -> str:
    pixels = "(N, H, W, C) uint8 or " if "uint8" in dtypes else ""
    return f"{pixels}(N, C, H, W) float32"
