"""Reading arrays from a ``.npz`` file that may be damaged, or made to take more memory than there is."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO, TypeAlias

import numpy as np

from deploykit.arrays import Array
from deploykit.errors import BundleError, DeployKitError
from deploykit.places import is_environment, read_error
from deploykit.plain_files import open_plain

SMALL_BYTES = 256 << 20
MOST_PACKED = 8

_SUFFIX = ".npy"


ReadHeader: TypeAlias = Callable[[IO[bytes]], tuple[tuple[int, ...], bool, np.dtype[np.generic]]]
"""Gives shape, whether in Fortran's order, and dtype."""


class NpzArrays(Mapping[str, Array]):
    """The arrays of an open file, each read when it is asked for.

    Before an array is allocated, its header and the sum of those that were read before are held against ``limit``.
    """

    def __init__(self, file: BinaryIO, limit: int | None) -> None:
        self._limit = limit
        self._read = 0
        with _damage_told():
            self._archive = zipfile.ZipFile(file)
            self._names = tuple(
                name.removesuffix(_SUFFIX) for name in self._archive.namelist() if name.endswith(_SUFFIX)
            )

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> Array:
        """Read one array; nothing is unpickled.

        Raises:
            KeyError: there is none of that name.
            ValueError: it is damaged, or larger than the limit leaves room for.
        """
        if name not in self._names:
            raise KeyError(name)
        with _damage_told():
            size = self._size_of(name)
            if self._limit is not None and self._read + size > self._limit:
                raise ValueError(
                    f"array {name!r} and those before it take {self._read + size} bytes; expected at most {self._limit}"
                )
            self._read += size
            with self._archive.open(name + _SUFFIX) as member:
                array: Array = np.lib.format.read_array(member, allow_pickle=False)
                if member.read(1):
                    raise ValueError(f"array {name!r} has bytes after its end")
        return array

    def _size_of(self, name: str) -> int:
        """Return the bytes of an array, by its header, which the archive's directory has to confirm."""
        with self._archive.open(name + _SUFFIX) as member:
            shape, dtype = _read_header(member)
        size = math.prod(shape) * dtype.itemsize
        told = self._archive.getinfo(name + _SUFFIX).file_size
        if not 0 <= size <= told:
            raise ValueError(f"array {name!r} has {shape} {dtype} in {told} bytes")
        return size


def unpacked_limit(packed: int) -> int:
    """Return how many bytes the arrays of a file may take that has ``packed`` bytes.

    Photographs and features of networks do not shrink to an eighth.
    """
    return max(SMALL_BYTES, MOST_PACKED * packed)


@contextmanager
def open_npz(source: Path | bytes, *, limit: int | None = None) -> Iterator[NpzArrays]:
    """Open a file to read arrays of it by name.

    Args:
        source: a plain file, or the content of one.
        limit: how many bytes the arrays that are read may take together; None: any.

    Raises:
        OSError: the file is missing or cannot be read.
        ValueError: it is damaged, no ``.npz``, or no plain file.
    """
    with io.BytesIO(source) if isinstance(source, bytes) else open_plain(source, follow=True) as file:
        yield NpzArrays(file, limit)


@contextmanager
def _damage_told() -> Iterator[None]:
    """Turn what the ZIP, its compression and NumPy's header parser raise, tokenize's among them, into ValueError."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        if is_environment(error):
            raise
        raise ValueError(f"not a readable .npz: {error!r}") from error


def read_npz(path: Path | bytes, *, limit: int | None = None) -> dict[str, Array]:
    """Read every array of a file by its name; see `open_npz`.

    A damaged directory can lose arrays without any checksum failing: ask for each by its name.
    """
    with open_npz(path, limit=limit) as arrays:
        return {name: arrays[name] for name in arrays}


def _read_header(member: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[np.generic]]:
    """Return the shape and type of an array.

    Raises:
        ValueError: not a header, or of objects, which would have to be unpickled.
    """
    version = np.lib.format.read_magic(member)
    read: ReadHeader | None = getattr(np.lib.format, f"read_array_header_{version[0]}_{version[1]}", None)
    if read is None:
        # Version 3 differs from 2 in the encoding of field names, and plain arrays have none.
        read = np.lib.format.read_array_header_2_0
    shape, _, dtype = read(member)
    if dtype.hasobject:
        raise ValueError("an array of Python objects, which allow_pickle=False does not read")
    return shape, dtype


@contextmanager
def bundled_arrays(what: str, source: Path | bytes) -> Iterator[NpzArrays]:
    """Open the arrays of a bundle's file, or of its content, and say what any fault in the block means for the bundle.

    Nothing is unpickled, and no more is allocated than such a file can hold.

    Args:
        what: the file for messages, such as ``"the baseline"``.
        source: the file, or what is in it.

    Raises:
        BundleError: the file is missing or damaged, or its arrays are not what the block expects.
        StorageError: this machine cannot read it now.
    """
    try:
        packed = len(source) if isinstance(source, bytes) else source.stat().st_size
        with open_npz(source, limit=unpacked_limit(packed)) as arrays:
            yield arrays
    except (DeployKitError, OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        if isinstance(error, OSError) and isinstance(source, Path) and is_environment(error):
            raise read_error(source, error) from error
        where = f" {source}" if isinstance(source, Path) else ""
        raise BundleError(
            f"{what}{where} cannot be read ({type(error).__name__}: {error}). "
            "The bundle is damaged: copy or export it again."
        ) from error
