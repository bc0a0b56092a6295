"""What an ONNX file with a QNN context binary holds, read from its bytes without any package: devices have no onnx.

Field numbers are those of onnx.proto3; the node is described in
github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.EPContext
"""

from __future__ import annotations

from collections.abc import Iterator

from deploykit.backends.protobuf import fields, numbers
from deploykit.errors import BundleError

CONTEXT = "EPContext"
DOMAIN = "com.microsoft"

_GRAPH, _NODE = 7, 1
_OP_TYPE, _ATTRIBUTE, _DOMAIN = 4, 5, 7
_ATTRIBUTE_NAME, _ATTRIBUTE_INTEGER = 1, 3


def check_context(model: bytes, name: str) -> None:
    """Refuse a file that is not made of QNN contexts alone, each inside the file.

    Raises:
        BundleError: it has another node, or one whose code lies in another file; or it is no readable ONNX file.
    """
    try:
        nodes = list(_nodes(model))
    except (ValueError, IndexError) as error:
        raise BundleError(
            f"{name} is not a readable ONNX file ({error}). Export the bundle again, or copy it again."
        ) from error
    others = sorted({operator for operator, _ in nodes if operator != f"{DOMAIN}.{CONTEXT}"})
    if others or not nodes:
        raise BundleError(
            f"{name} holds {', '.join(others) or 'no node'}; expected {CONTEXT} alone, which is what deploykit writes "
            "for Qualcomm's NPU. Export the bundle again."
        )
    if not all(embedded for _, embedded in nodes):
        raise BundleError(
            f"{name} keeps its code in another file, which deploykit never writes. Do not open this bundle."
        )


def _nodes(model: bytes) -> Iterator[tuple[str, bool]]:
    """Yield each node's operator with its domain, and whether its code is inside."""
    for number, start, end in fields(model, 0, len(model)):
        if number != _GRAPH:
            continue
        for inner, begin, stop in fields(model, start, end):
            if inner == _NODE:
                yield _node(model, begin, stop)


def _node(data: bytes, start: int, end: int) -> tuple[str, bool]:
    operator = domain = ""
    embedded = False
    for number, begin, stop in fields(data, start, end):
        if number == _OP_TYPE:
            operator = data[begin:stop].decode(errors="replace")
        elif number == _DOMAIN:
            domain = data[begin:stop].decode(errors="replace")
        elif number == _ATTRIBUTE and _attribute_name(data, begin, stop) == b"embed_mode":
            embedded = (_ATTRIBUTE_INTEGER, 1) in numbers(data, begin, stop)
    return f"{domain}.{operator}" if domain else operator, embedded


def _attribute_name(data: bytes, start: int, end: int) -> bytes:
    return next(
        (data[begin:stop] for number, begin, stop in fields(data, start, end) if number == _ATTRIBUTE_NAME), b""
    )
