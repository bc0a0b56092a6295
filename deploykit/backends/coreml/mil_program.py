"""An .mlpackage folder as operations and constants, read from its bytes: on any system, without Apple's library.

The numbers of fields are those of Model.proto, FeatureTypes.proto and MIL.proto, and the header of a constant is that
of StorageFormat.hpp (github.com/apple/coremltools, mlmodel/).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

from deploykit.backends.protobuf import fields, numbers, varint
from deploykit.errors import BundleError

CONTENT = "Data/com.apple.CoreML"
MODEL = f"{CONTENT}/model.mlmodel"
WEIGHTS = f"{CONTENT}/weights/weight.bin"
WEIGHT_INPUTS = {"conv": "weight", "conv_transpose": "weight", "linear": "weight", "matmul": "y"}
"""The operators that may have a constant weight, each with the input that takes it."""

_BLOB_HEADER = struct.Struct("<IIQQ")
_BLOB_SENTINEL = 0xDEADBEEF

Message = tuple[int, int]
"""Where a message begins and ends in a file."""


@dataclass(frozen=True, kw_only=True)
class Feature:
    """An input or an output of the whole network; ``dtype`` is `FLOAT32` or another of ArrayFeatureType."""

    name: str
    shape: tuple[int, ...]
    dtype: int


FLOAT32 = 65568
INT32 = 131104


@dataclass(frozen=True, kw_only=True)
class Operation:
    """An operator: the tensors that it reads, by parameter, those that it writes, and the bytes of its constants."""

    kind: str
    inputs: dict[str, str]
    outputs: tuple[str, ...]
    constants: dict[str, bytes]

    @property
    def output(self) -> str:
        """The first tensor that it writes."""
        return self.outputs[0]


class MilProgram:
    """A network in a package.

    Args:
        files: the package's files, by their paths in it.
        name: of the package, for messages.

    Raises:
        BundleError: it is not a package with a program.
    """

    def __init__(self, files: dict[str, bytes], name: str) -> None:
        if MODEL not in files:
            raise BundleError(f"{name} has no {MODEL}. Export the bundle again, or copy it again.")
        self._data, self._weights = files[MODEL], files.get(WEIGHTS, b"")
        try:
            self._whole = _by_number(self._data, (0, len(self._data)))
            (self._description,), (self._program,) = self._whole[2], self._whole[502]
            self.inputs, self.outputs = (tuple(map(self._feature, self._described(number))) for number in (1, 10))
            self.operations = tuple(map(self._operation, self._operators()))
        except (ValueError, IndexError, KeyError, struct.error) as error:
            raise BundleError(
                f"{name} is not a readable ML program ({type(error).__name__}: {error}). Export the bundle again, or "
                "copy it again."
            ) from error

    @cached_property
    def makers(self) -> dict[str, Operation]:
        """The operator that writes each tensor."""
        return {output: operation for operation in self.operations for output in operation.outputs}

    def maker(self, operation: Operation, parameter: str, *, through_casts: bool = False) -> Operation | None:
        """Return what writes an input of an operator; None for images, and where it has no such input."""
        made = self.makers.get(operation.inputs.get(parameter, ""))
        while through_casts and made is not None and made.kind == "cast":
            made = self.makers.get(made.inputs.get("x", ""))
        return made

    def constant(self, operation: Operation, parameter: str) -> bytes | None:
        """Return the bytes of a constant that an operator reads; None where it is computed, or left out."""
        maker = self.maker(operation, parameter)
        return maker.constants.get("val") if maker is not None and maker.kind == "const" else None

    def weighted(self) -> Iterator[tuple[Operation, Operation]]:
        """Yield every operator with a constant weight, and what holds that weight."""
        for operation in self.operations:
            weight = self.maker(operation, WEIGHT_INPUTS.get(operation.kind, ""), through_casts=True)
            if weight is not None and (weight.kind == "const" or weight.kind.startswith("constexpr_")):
                yield operation, weight

    def _described(self, number: int) -> list[Message]:
        return _by_number(self._data, self._description).get(number, [])

    def _feature(self, place: Message) -> Feature:
        parts = _by_number(self._data, place)
        (array,) = _by_number(self._data, parts[3][0])[5]
        plain = _numbers(self._data, array)
        (packed,) = _by_number(self._data, array).get(1, [(0, 0)])
        return Feature(name=self._text(parts[1][0]), shape=tuple(_varints(self._data, packed)), dtype=plain.get(2, 0))

    def _operators(self) -> list[Message]:
        """Return the operators of the only function's only block."""
        (entry,) = _by_number(self._data, self._program)[2]
        (function,) = _by_number(self._data, entry)[2]
        (specialization,) = _by_number(self._data, function)[3]
        (block,) = _by_number(self._data, specialization)[2]
        return _by_number(self._data, block).get(3, [])

    def _operation(self, place: Message) -> Operation:
        parts = _by_number(self._data, place)
        entries = [_by_number(self._data, entry) for entry in parts.get(2, [])]
        named = {self._text(entry[1][0]): self._first_name(entry[2][0]) for entry in entries}
        attributes = [_by_number(self._data, entry) for entry in parts.get(5, [])]
        return Operation(
            kind=self._text(parts[1][0]),
            inputs={key: name for key, name in named.items() if name is not None},
            outputs=tuple(self._text(_by_number(self._data, output)[1][0]) for output in parts.get(3, [])),
            constants={self._text(entry[1][0]): self._value(entry[2][0]) for entry in attributes},
        )

    def _first_name(self, argument: Message) -> str | None:
        bindings = _by_number(self._data, argument).get(1, [])
        names = _by_number(self._data, bindings[0]).get(1, []) if bindings else []
        return self._text(names[0]) if names else None

    def _value(self, place: Message) -> bytes:
        """Return the bytes of a constant; those of plain integers as the varints that the file has."""
        parts = _by_number(self._data, place)
        if 5 in parts:
            return self._blob(_numbers(self._data, parts[5][0]).get(2, 0))
        for number in (3, 1):  # an immediate value, a tensor
            if number not in parts:
                return b""
            parts = _by_number(self._data, parts[number][0])
        (values,) = next(iter(parts.values()), [(0, 0)])
        return b"".join(
            self._data[start:end] for each in _by_number(self._data, values).values() for start, end in each
        )

    def _blob(self, offset: int) -> bytes:
        sentinel, _, size, start = _BLOB_HEADER.unpack_from(self._weights, offset)
        if sentinel != _BLOB_SENTINEL or start + size > len(self._weights):
            raise ValueError(f"no constant at byte {offset} of {PurePosixPath(WEIGHTS).name}")
        return self._weights[start : start + size]

    def _text(self, place: Message) -> str:
        return self._data[slice(*place)].decode("utf-8")


def read_program(package: Path) -> MilProgram:
    """Read the program of an .mlpackage folder.

    Raises:
        BundleError: it is none.
    """
    files = {name: (package / name).read_bytes() for name in (MODEL, WEIGHTS) if (package / name).is_file()}
    return MilProgram(files, package.name)


def _by_number(data: bytes, place: Message) -> dict[int, list[Message]]:
    found: dict[int, list[Message]] = {}
    for number, start, end in fields(data, *place):
        found.setdefault(number, []).append((start, end))
    return found


def _numbers(data: bytes, place: Message) -> dict[int, int]:
    return dict(numbers(data, *place))


def _varints(data: bytes, place: Message) -> Iterator[int]:
    position, end = place
    while position < end:
        value, position = varint(data, position)
        yield value
