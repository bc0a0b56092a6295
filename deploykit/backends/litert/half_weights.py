"""CONV(x, w) -> CONV(x, DEQUANTIZE(half(w))): weights that half precision holds exactly take half the space.

LiteRT dequantizes such constants once, when the engine opens, and computes in float32: nothing changes but the file.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from deploykit.backends.litert.flatbuffer import WEIGHTED, TFLiteModel

FEWEST_VALUES = 1024
"""Smaller weights stay as they are: an operator more for each would cost what it saves."""


def store_halves(content: bytes) -> bytes:
    """Return a .tflite file whose float32 weights are stored in float16 where that loses nothing."""
    model = TFLiteModel(content)
    changed = False
    for graph in model.raw.subgraphs:
        restored: dict[int, int] = {}
        for raw in graph.operators:
            if model.name_of(raw) not in WEIGHTED:
                continue
            index = int(raw.inputs[1])
            if index not in restored:
                halves = _exact_halves(model, graph.tensors[index])
                if halves is None:
                    continue
                restored[index] = _add_half(model, graph, graph.tensors[index], halves)
        graph.operators = [
            model.conversion("DEQUANTIZE", half, index) for index, half in restored.items()
        ] + graph.operators
        changed = changed or bool(restored)
    return model.pack() if changed else content


def _exact_halves(model: TFLiteModel, tensor: Any) -> npt.NDArray[np.float16] | None:
    """Return a constant of float32 in float16, where that holds each of its values."""
    data = model.constant(tensor)
    if data is None or tensor.type != model.schema.TensorType.FLOAT32:
        return None
    values = np.frombuffer(data.tobytes(), np.float32)
    if values.size < FEWEST_VALUES or np.abs(values).max() > np.finfo(np.float16).max:
        return None
    halves = values.astype(np.float16)
    return halves if np.array_equal(halves.astype(np.float32), values) else None


def _add_half(model: TFLiteModel, graph: Any, tensor: Any, halves: npt.NDArray[np.float16]) -> int:
    """Add the constant in float16; ``tensor`` is computed from it from now on. Return the constant's index."""
    index = model.add_tensor(
        graph, bytes(tensor.name) + b"/half", tensor, "FLOAT16", model.add_buffer(halves.tobytes())
    )
    tensor.buffer = model.release(tensor.buffer)
    return index
