"""The wire format of protocol buffers (protobuf.dev/programming-guides/encoding), as far as ONNX files use it."""

from __future__ import annotations

from collections.abc import Iterator

VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def fields(data: bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield the fields of bytes in a message, as (number, start, end)."""
    position = start
    while position < end:
        tag, position = varint(data, position)
        number, wire = tag >> 3, tag & 7
        if wire == VARINT:
            _, position = varint(data, position)
        elif wire == _FIXED64:
            position += 8
        elif wire == _FIXED32:
            position += 4
        elif wire == _BYTES:
            length, position = varint(data, position)
            if position + length > end:
                raise ValueError(f"a field of {length} bytes at byte {position} is longer than its message")
            yield number, position, position + length
            position += length
        else:
            raise ValueError(f"a field of wire type {wire} at byte {position}")
    if position > end:
        raise ValueError(f"a field ends behind its message at byte {end}")


def varint(data: bytes, position: int) -> tuple[int, int]:
    """Return the number that begins at a byte, and the byte behind it."""
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError(f"a number of more than 64 bits at byte {position}")


def numbers(data: bytes, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield the plain integers of a message, as (number of the field, value)."""
    position = start
    while position < end:
        tag, position = varint(data, position)
        number, wire = tag >> 3, tag & 7
        if wire == VARINT:
            value, position = varint(data, position)
            yield number, value
        elif wire == _BYTES:
            length, position = varint(data, position)
            position += length
        else:
            position += 8 if wire == _FIXED64 else 4
