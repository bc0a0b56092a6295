"""What XNNPACK's delegate was compiled to: its layers with constant weights, read from a .pte file.

The fields are those of ``backends/xnnpack/serialization/schema.fbs`` in the package executorch.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from deploykit.backends.executorch.flatbuffer import Table
from deploykit.backends.executorch.program_file import ProgramFile

_MAGIC = b"XH00"
_FLOAT, _INT8, _INT8_BY_CHANNEL, _INT8_BY_ROW = 1, 3, 6, 9
_QUANTIZED_VALUE, _PER_CHANNEL = 2, 1
_LAYERS = {2: ("fully connected", 0, 3), 7: ("convolution", 15, 18), 13: ("depthwise convolution", 15, 18)}
"""Kinds of nodes to their name, and the fields of the first input and the output; the weight is behind the input."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A convolution or matrix product: its weight as it is stored, and in which types it reads and writes.

    ``static``: it reads and writes int8 in fixed ranges. ``dynamic``: it rounds each row that it reads.
    """

    kind: str
    weight: bytes
    scales: bytes
    integer_weight: bool
    static: bool
    dynamic: bool


def delegated_layers(content: bytes) -> list[Layer]:
    """Return the layers with constant weights of every delegate of a .pte file."""
    program = ProgramFile(content)
    named = program.named_data()
    return [layer for data in program.delegates() for layer in _DelegateGraph(data, named).layers()]


class _DelegateGraph:
    """One delegate."""

    def __init__(self, data: bytes, named: dict[str, bytes]) -> None:
        start, size, constants = struct.unpack_from("<III", data, 10) if data[4:8] == _MAGIC else (0, len(data), 0)
        self._graph = Table.root(data[start : start + size])
        self._constants = data[constants:]
        self._named = named
        self._values: dict[int, Table] = {}
        self._quantization: dict[int, Table] = {}
        for value in self._graph.tables(2):
            self._add(value)

    def layers(self) -> Iterator[Layer]:
        """Yield the layers with constant weights, in order."""
        for each in self._graph.tables(1):
            known, node = _LAYERS.get(each.number(0, "B")), each.table(1)
            if known is None or node is None:
                continue
            kind, first, last = known
            source, weight, output = (node.number(field, "I") for field in (first, first + 1, last))
            data = self._constant(self._values[weight].number(3, "I"))
            if data is not None:
                yield Layer(
                    kind=kind,
                    weight=data,
                    scales=self._scales(weight),
                    integer_weight=self._type(weight) == _INT8_BY_CHANNEL,
                    static=self._type(source) == self._type(output) == _INT8,
                    dynamic=self._type(source) == _INT8_BY_ROW and self._type(output) == _FLOAT,
                )

    def _add(self, value: Table) -> None:
        tensor = value.table(1)
        if tensor is not None and value.number(0, "B") == _QUANTIZED_VALUE:
            quantization, kind = tensor.table(2), tensor.number(1, "B")
            tensor = tensor.table(0)
            if tensor is not None and quantization is not None and kind == _PER_CHANNEL:
                self._quantization[tensor.number(6, "I")] = quantization
        if tensor is not None:
            self._values[tensor.number(6, "I")] = tensor

    def _type(self, value: int) -> int:
        return self._values[value].number(0, "h")

    def _scales(self, value: int) -> bytes:
        """Return the scale of each channel in float32; nothing where the weight is float."""
        quantization = self._quantization.get(value)
        if quantization is None:
            return b""
        inline: bytes = quantization.numbers(0, "f").tobytes()
        return inline or self._constant(quantization.number(2, "I")) or b""

    def _constant(self, index: int) -> bytes | None:
        """Return a constant by its index; None for index 0, which stands for none."""
        if index == 0:
            return None
        constant = self._graph.tables(8)[index]
        key = constant.text(2)
        if key:
            return self._named[key][: constant.number(1, "Q")]
        start = constant.number(0, "Q")
        return self._constants[start : start + constant.number(1, "Q")]
