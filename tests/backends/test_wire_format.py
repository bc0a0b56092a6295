"""ONNX files read without onnx: fields of every wire type, and files that are made to be read for ever."""

from __future__ import annotations

import pytest

from deploykit.backends.onnx_external import references
from deploykit.backends.onnx_header import onnx_needs
from deploykit.errors import BundleError

GRAPH, NODE, ATTRIBUTE, SUBGRAPH, INITIALIZER = 7, 1, 5, 6, 5
IR_VERSION = 1


def varint(number: int) -> bytes:
    found = b""
    while number >= 0x80:
        found += bytes([number & 0x7F | 0x80])
        number >>= 7
    return found + bytes([number])


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def nested(depth: int, innermost: bytes = b"") -> bytes:
    """A model whose node holds a graph whose node holds a graph, and so on."""
    graph = innermost
    for _ in range(depth):
        graph = field(NODE, field(ATTRIBUTE, field(SUBGRAPH, graph)))
    return field(GRAPH, graph)


def test_fields_of_every_wire_type_are_passed_over():
    model = varint(20 << 3 | 1) + bytes(8) + varint(21 << 3 | 5) + bytes(4) + field(22, b"text")
    model += varint(IR_VERSION << 3) + varint(300)
    assert onnx_needs(model, "model.onnx").ir_version == 300


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (varint(IR_VERSION << 3) + b"\x80" * 12 + b"\x01", "a number of more than 64 bits"),
        (varint(IR_VERSION << 3) + b"\x80" * 3, "is not a readable ONNX file"),
        (varint(3 << 3 | 3), "a field of wire type 3"),
        (field(GRAPH, varint(NODE << 3 | 2) + varint(1000)), "is longer than its message"),
        (nested(101), "graphs nested deeper than 100"),
    ],
    ids=["a number without end", "ends in a number", "an old wire type", "longer than its message", "depth"],
)
def test_a_file_that_cannot_be_is_refused_by_its_name(model, message):
    with pytest.raises(BundleError, match=rf"model\.onnx is not a readable ONNX file.*{message}|{message}"):
        onnx_needs(model, "model.onnx")


def test_references_are_not_looked_for_without_end():
    location = field(1, b"location") + field(2, b"weights.bin")
    tensor = field(INITIALIZER, field(13, location) + varint(14 << 3) + varint(1))
    assert references(field(GRAPH, tensor), "model.onnx")[0] == ("weights.bin",)
    with pytest.raises(BundleError, match="messages nested deeper than 100"):
        references(nested(60, tensor), "model.onnx")
