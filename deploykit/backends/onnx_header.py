"""What an ONNX file needs of whoever reads it: its IR version, its opsets, its operators. Read without any package.

Field numbers are those of onnx.proto3.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from deploykit.backends.protobuf import fields, numbers
from deploykit.errors import BundleError

_IR_VERSION, _GRAPH, _OPSET = 1, 7, 8
_NODE = 1
_OP_TYPE, _ATTRIBUTE, _DOMAIN = 4, 5, 7
_ATTRIBUTE_GRAPH = (6, 11)
_OPSET_DOMAIN, _OPSET_VERSION = 1, 2
_DEEPEST = 100


@dataclass(frozen=True, kw_only=True)
class OnnxNeeds:
    """The IR version; the opset by domain, where the empty name is ONNX's own; the operators as (domain, name)."""

    ir_version: int
    opsets: dict[str, int]
    operators: frozenset[tuple[str, str]]


def onnx_needs(model: bytes, name: str) -> OnnxNeeds:
    """Read what a model needs.

    Raises:
        BundleError: it is not a readable ONNX file.
    """
    try:
        version = next((value for number, value in numbers(model, 0, len(model)) if number == _IR_VERSION), 0)
        opsets: dict[str, int] = {}
        operators: set[tuple[str, str]] = set()
        for number, start, end in fields(model, 0, len(model)):
            if number == _OPSET:
                opsets.update([_opset(model, start, end)])
            elif number == _GRAPH:
                operators.update(_operators(model, start, end, 0))
    except (ValueError, IndexError) as error:
        raise BundleError(
            f"{name} is not a readable ONNX file ({error}). Export the bundle again, or copy it again."
        ) from error
    return OnnxNeeds(ir_version=version, opsets=opsets, operators=frozenset(operators))


def _opset(data: bytes, start: int, end: int) -> tuple[str, int]:
    domain = next((_text(data, *rest) for number, *rest in fields(data, start, end) if number == _OPSET_DOMAIN), "")
    version = next((value for number, value in numbers(data, start, end) if number == _OPSET_VERSION), 0)
    return ("" if domain == "ai.onnx" else domain), version


def _operators(data: bytes, start: int, end: int, depth: int) -> Iterator[tuple[str, str]]:
    """Yield the operators of a graph, and of the graphs inside its nodes."""
    if depth > _DEEPEST:
        raise ValueError(f"graphs nested deeper than {_DEEPEST}")
    for number, begin, stop in fields(data, start, end):
        if number != _NODE:
            continue
        operator = domain = ""
        for inner, first, last in fields(data, begin, stop):
            if inner == _OP_TYPE:
                operator = _text(data, first, last)
            elif inner == _DOMAIN:
                domain = _text(data, first, last)
            elif inner == _ATTRIBUTE:
                for part, here, there in fields(data, first, last):
                    if part in _ATTRIBUTE_GRAPH:
                        yield from _operators(data, here, there, depth + 1)
        yield ("" if domain == "ai.onnx" else domain), operator


def _text(data: bytes, start: int, end: int) -> str:
    return data[start:end].decode(errors="replace")
