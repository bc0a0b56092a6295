"""What an ONNX file refers to outside itself, read from its bytes without any package: devices have no onnx.

Field numbers are those of onnx.proto3.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import TypeAlias

from deploykit.backends.engine_file import EngineFile
from deploykit.backends.protobuf import fields
from deploykit.errors import BundleError

_EXTERNAL_KEY = b"location"
_PRECOMPILED = b"EPContext"
_DEEPEST = 100

_Messages: TypeAlias = dict[str, dict[int, str]]
_MESSAGES: _Messages = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "tensor": {13: "entry"},
}
"""The messages inside each message, by field, on the way to ``TensorProto.external_data``."""

_OPERATOR = {"node": 4}
_KEY, _VALUE = 1, 2


def load_external_data(engine: EngineFile, *, compiled: bool = False) -> tuple[str, ...]:
    """Read the external weights of an ONNX engine from its bundle; returns their names, as the model has them.

    Args:
        engine: of the bundle.
        compiled: it is machine code, which deploykit wrote there for the device that it was made for.

    Raises:
        BundleError: a name leads out of the bundle or is not recorded in it, the model holds code that another
            program compiled, or it cannot be read.
    """
    locations, operators = references(engine.read(), engine.name)
    if _PRECOMPILED in operators and not compiled:
        raise BundleError(
            f"{engine.name} holds a node of type {_PRECOMPILED.decode()}: code that was compiled elsewhere, which "
            "deploykit never writes. Do not open this bundle."
        )
    for location in locations:
        path = PurePosixPath(location)
        if path.is_absolute() or ".." in path.parts or "*" in location or "\\" in location or str(path) != location:
            raise BundleError(
                f"{engine.name} keeps weights in {location!r}; expected a plain path inside the bundle. "
                "Do not open this bundle: it was not written by deploykit."
            )
        engine.include(location)
    return locations


def references(model: bytes, name: str) -> tuple[tuple[str, ...], frozenset[bytes]]:
    """Return the files that hold tensors of an ONNX model, and those of its operators that are looked for here.

    Raises:
        BundleError: the model mentions such a file or operator, and is not a readable ONNX file.
    """
    locations: dict[str, None] = {}
    operators = set()
    if not _mentions(model, 0, len(model)):
        return (), frozenset()
    try:
        for kind, number, start, end in _walk(model, "model", 0, len(model), 0):
            if kind == "entry":
                locations.update(dict.fromkeys(_locations(model, start, end)))
            elif number == _OPERATOR.get(kind) and model[start:end] == _PRECOMPILED:
                operators.add(_PRECOMPILED)
    except (ValueError, IndexError) as error:
        raise BundleError(
            f"{name} is not a readable ONNX file ({error}). Export the bundle again, or copy it again."
        ) from error
    return tuple(locations), frozenset(operators)


def _walk(data: bytes, kind: str, start: int, end: int, depth: int) -> Iterator[tuple[str, int, int, int]]:
    """Yield every external-data entry, and every field of bytes of a node, as (message, field, start, end)."""
    if depth > _DEEPEST:
        raise ValueError(f"messages nested deeper than {_DEEPEST}")
    if kind == "entry":
        yield kind, 0, start, end
        return
    inner = _MESSAGES[kind]
    for number, begin, stop in fields(data, start, end):
        if number in inner:
            # Strings stand in the bytes as they are, so that a node without these words needs no closer look.
            if inner[number] == "node" and not _mentions(data, begin, stop):
                continue
            yield from _walk(data, inner[number], begin, stop, depth + 1)
        elif number == _OPERATOR.get(kind):
            yield kind, number, begin, stop


def _mentions(data: bytes, start: int, end: int) -> bool:
    return data.find(_EXTERNAL_KEY, start, end) >= 0 or data.find(_PRECOMPILED, start, end) >= 0


def _locations(data: bytes, start: int, end: int) -> Iterator[str]:
    """Yield the values of an entry that has ``location`` as a key, whichever of its keys a reader takes."""
    found = list(fields(data, start, end))
    if any(number == _KEY and data[begin:stop] == _EXTERNAL_KEY for number, begin, stop in found):
        for number, begin, stop in found:
            if number == _VALUE:
                yield data[begin:stop].decode(errors="surrogateescape")
