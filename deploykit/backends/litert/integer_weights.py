"""The plan's integers in a .tflite file: written for linears, checked for all.

LiteRT's converter knows int8 weights only between int8 tensors. The file format also has linears that read and write
floats with int8 weights ("dynamic range"): the kernel rounds each row that it reads, by that row's own range.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from deploykit.backends.litert.flatbuffer import WEIGHTED, TFLiteModel
from deploykit.errors import ExportError

_REMEDY = (
    "LiteRT keeps a layer in float without a word where it merges what stands beside it into its weight, or where its "
    "output is not rounded. Keep the layer in float in the plan, or export for another runtime."
)


@dataclass(frozen=True, kw_only=True)
class IntegerWeight:
    """A weight ``(outputs, inputs, ...)`` as int8 with one scale for each output.

    ``dynamic``: its operator reads and writes floats.
    """

    name: str
    integers: npt.NDArray[np.int8]
    scales: npt.NDArray[np.float32]
    dynamic: bool

    @property
    def floats(self) -> npt.NDArray[np.float32]:
        """The weight that the integers stand for."""
        return self.integers.astype(np.float32) * self.scales.reshape(-1, *(1 for _ in self.integers.shape[1:]))

    def stored(self) -> bytes:
        """Return the integers as a file holds them: channels last, those of a depthwise convolution behind its map."""
        if self.integers.ndim == 2:
            return self.integers.tobytes()
        depthwise = self.integers.shape[1] == 1
        return np.ascontiguousarray(self.integers.transpose((1, 2, 3, 0) if depthwise else (0, 2, 3, 1))).tobytes()


def write_integers(content: bytes, weights: list[IntegerWeight]) -> bytes:
    """Return a .tflite file in which the dynamic ones of these weights have their integers.

    Args:
        content: a file whose linears have the weights `IntegerWeight.floats`, to the bit.
        weights: those of the plan; the others are in the file already.
    """
    wanted = {weight.floats.tobytes(): weight for weight in weights if weight.dynamic}
    if not wanted:
        return content
    model = TFLiteModel(content)
    written: set[tuple[int, int]] = set()
    for operator in list(model.operators()):
        if operator.name != "FULLY_CONNECTED":
            continue
        index = operator.inputs[1]
        tensor = operator.graph.tensors[index]
        data = model.constant(tensor)
        weight = wanted.get(data.tobytes()) if data is not None else None
        if weight is not None:
            _write(model, tensor, weight)
            written.add((id(operator.graph), index))
        if (id(operator.graph), index) in written:  # of several that read one weight, each
            operator.raw.builtinOptions.asymmetricQuantizeInputs = True
    return model.pack()


def _write(model: TFLiteModel, tensor: Any, weight: IntegerWeight) -> None:
    model.release(tensor.buffer)
    tensor.buffer = model.add_buffer(weight.integers.tobytes())
    tensor.type = model.schema.TensorType.INT8
    quantization = model.schema.QuantizationParametersT()
    quantization.scale = weight.scales
    quantization.zeroPoint = np.zeros(len(weight.scales), np.int64)
    quantization.quantizedDimension = 0
    tensor.quantization = quantization


def check_integers(content: bytes, weights: list[IntegerWeight]) -> None:
    """Prove that a .tflite file computes every planned operator in integers, with the plan's integers.

    Raises:
        ExportError: it does not; the message names the operators. The converter leaves them in float without a word.
    """
    model = TFLiteModel(content)
    found = _integer_operators(model)
    missing = [weight.name for weight in weights if (weight.stored(), not weight.dynamic) not in found]
    if missing:
        raise ExportError(
            f"LiteRT's converter left {', '.join(missing)} in float, and the plan has integers there. {_REMEDY}"
        )


def _integer_operators(model: TFLiteModel) -> set[tuple[bytes, bool]]:
    """Return the int8 weights that operators read, each with whether what they read and write is int8 too."""
    found = set()
    for operator in model.operators():
        if operator.name not in WEIGHTED:
            continue
        graph, (source, weight) = operator.graph, operator.inputs[:2]
        data = model.constant(graph.tensors[weight])
        if data is not None and model.is_integer(graph, weight):
            ends = (source, int(operator.raw.outputs[0]))
            found.add((data.tobytes(), all(model.is_integer(graph, end) for end in ends)))
    return found
