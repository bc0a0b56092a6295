"""Tables of a FlatBuffers file (flatbuffers.dev/internals), read by the numbers of their fields."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Table:
    """A table: ``field`` is the position of a field in the schema, from 0; a union has two, its kind and its value."""

    def __init__(self, data: bytes, position: int) -> None:
        self._data = data
        self._position = position
        self._fields = position - self._read("<i", position)

    @classmethod
    def root(cls, data: bytes) -> Table:
        """Return the first table of a file."""
        return cls(data, int(struct.unpack_from("<I", data)[0]))

    def number(self, field: int, kind: str, default: int = 0) -> int:
        """Return an integer; ``kind`` is its letter in `struct`."""
        place = self._place(field)
        return default if place is None else self._read(f"<{kind}", place)

    def table(self, field: int) -> Table | None:
        """Return the table that a field points to; None where it is absent."""
        place = self._place(field)
        return None if place is None else Table(self._data, self._target(place))

    def tables(self, field: int) -> list[Table]:
        """Return the tables of a vector."""
        start, count = self._vector(field)
        return [Table(self._data, self._target(start + 4 * index)) for index in range(count)]

    def text(self, field: int) -> str:
        """Return a string, empty where it is absent."""
        start, count = self._vector(field)
        return self._data[start : start + count].decode()

    def numbers(self, field: int, kind: str) -> NDArray[Any]:
        """Return a vector of numbers; ``kind`` is their letter in `struct`."""
        start, count = self._vector(field)
        return np.frombuffer(self._data, np.dtype(f"<{kind}"), count, start)

    def _vector(self, field: int) -> tuple[int, int]:
        place = self._place(field)
        if place is None:
            return 0, 0
        start = self._target(place)
        return start + 4, self._read("<I", start)

    def _place(self, field: int) -> int | None:
        slot = 4 + 2 * field
        if slot >= self._read("<H", self._fields):
            return None
        offset = self._read("<H", self._fields + slot)
        return self._position + offset if offset else None

    def _target(self, place: int) -> int:
        return place + self._read("<I", place)

    def _read(self, kind: str, place: int) -> int:
        return int(struct.unpack_from(kind, self._data, place)[0])
