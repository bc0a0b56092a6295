"""Whole bundles of the small network, and a second one whose engine gives other numbers."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import numpy as np

from deploykit.bundle import write_manifest, writing
from deploykit.parity.reference import capture
from tests.conftest_graphs import engine_of, photographs, reference

SCALE = 2.0


def write_bundle(folder: Path, runtime: str, *, scaled: bool = False) -> Path:
    """Write a bundle with two reference images; ``scaled``: every weight is `SCALE` times as large."""
    manifest, source = engine_of(runtime)
    with writing(folder, overwrite=True) as staging:
        for file in source.iterdir():
            shutil.copyfile(file, staging / file.name)
        if scaled:
            _scale_weights(staging, runtime)
        images = photographs(2)
        expected = dict(zip(("stem", "stage1"), reference(images), strict=True))
        capture(images, expected).save(staging / "reference.npz")
        write_manifest(staging, manifest)
    return folder


def _scale_weights(folder: Path, runtime: str) -> None:
    if runtime == "openvino":
        weights = np.fromfile(folder / "model.bin", np.float32)
        # Shapes and axes are integers, which read as floats are tiny.
        real = np.isfinite(weights) & (np.abs(weights) > 1e-6) & (np.abs(weights) < 1e6)
        weights[real] *= SCALE
        weights.tofile(folder / "model.bin")
        return
    import onnx
    from onnx import numpy_helper

    model = onnx.load(folder / "model.onnx")
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(SCALE), tensor.name))
    onnx.save(model, folder / "model.onnx")


def onnx_with_external(location: bytes, *, name: bytes = b"w") -> bytes:
    """The bytes of an ONNX model that adds one external float to its input, written by hand."""

    def field(number: int, payload: bytes) -> bytes:
        return bytes([number << 3 | 2]) + _varint(len(payload)) + payload

    def entry(key: bytes, value: bytes) -> bytes:
        return field(13, field(1, key) + field(2, value))

    def value(text: bytes) -> bytes:
        shape = field(2, field(1, b"\x08\x01"))
        return field(1, text) + field(2, field(1, b"\x08\x01" + shape))

    tensor = b"\x08\x01\x10\x01" + field(8, name) + entry(b"location", location) + b"\x70\x01"
    node = field(1, b"x") + field(1, name) + field(2, b"y") + field(4, b"Add")
    graph = field(1, node) + field(2, b"g") + field(5, tensor) + field(11, value(b"x")) + field(12, value(b"y"))
    return b"\x08\x09" + field(7, graph) + field(8, b"\x10\x11")


def _varint(number: int) -> bytes:
    out = b""
    while number > 0x7F:
        out += bytes([number & 0x7F | 0x80])
        number >>= 7
    return out + struct.pack("B", number)
