"""A .tflite file as Python objects, by the schema that the runtime's package carries."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from deploykit.backends.litert.package import PACKAGE
from deploykit.optional import require

WEIGHTED = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "TRANSPOSE_CONV")
"""The operators whose second input is a weight."""


@dataclass(frozen=True, kw_only=True)
class Operator:
    """One operator of a graph: ``raw`` is the schema's own object, its inputs and outputs are indices of tensors."""

    name: str
    graph: Any
    raw: Any

    @property
    def inputs(self) -> tuple[int, ...]:
        """The tensors that it reads; -1 for one that is left out."""
        return tuple(int(index) for index in self.raw.inputs)


class TFLiteModel:
    """A model that can be read, changed and packed again."""

    def __init__(self, content: bytes) -> None:
        self.schema: ModuleType = require("ai_edge_litert.schema_py_generated", PACKAGE)
        self.raw: Any = self.schema.ModelT.InitFromPackedBuf(content)
        self._size = len(content)
        codes = vars(self.schema.BuiltinOperator).items()
        self._names = {code: name for name, code in codes if isinstance(code, int)}

    def operators(self) -> Iterator[Operator]:
        """Yield every operator of every graph, in the order in which they run."""
        for graph in self.raw.subgraphs:
            for raw in graph.operators:
                yield Operator(name=self.name_of(raw), graph=graph, raw=raw)

    def name_of(self, raw: Any) -> str:
        """Return an operator's name, such as ``CONV_2D``."""
        return str(self._names[self.raw.operatorCodes[raw.opcodeIndex].builtinCode])

    def constant(self, tensor: Any) -> npt.NDArray[np.uint8] | None:
        """Return the bytes of a constant tensor; None where it is computed."""
        data = self.raw.buffers[tensor.buffer].data
        return None if data is None or len(data) == 0 else np.asarray(data, np.uint8)

    def is_integer(self, graph: Any, index: int) -> bool:
        """Return whether a tensor holds int8."""
        return bool(graph.tensors[index].type == self.schema.TensorType.INT8)

    def add_buffer(self, content: bytes) -> int:
        """Add the bytes of a constant; return their index."""
        buffer = self.schema.BufferT()
        buffer.data = np.frombuffer(content, np.uint8)
        self.raw.buffers.append(buffer)
        return len(self.raw.buffers) - 1

    def add_tensor(self, graph: Any, name: bytes, like: Any, kind: str, buffer: int = 0) -> int:
        """Add a tensor with the shape of another, computed where it has no constant's buffer; return its index."""
        tensor = self.schema.TensorT()
        tensor.name, tensor.shape, tensor.buffer = name, like.shape, buffer
        tensor.type = getattr(self.schema.TensorType, kind)
        graph.tensors.append(tensor)
        return len(graph.tensors) - 1

    def conversion(self, name: str, source: int, target: int) -> Any:
        """Return an operator ``QUANTIZE`` or ``DEQUANTIZE`` between two tensors, for a graph to take."""
        options = f"{name.capitalize()}Options"
        operator = self.schema.OperatorT()
        operator.opcodeIndex = self.operator_code(name)
        operator.inputs, operator.outputs = np.array([source], np.int32), np.array([target], np.int32)
        operator.builtinOptionsType = getattr(self.schema.BuiltinOptions, options)
        operator.builtinOptions = getattr(self.schema, f"{options}T")()
        return operator

    def release(self, buffer: int) -> int:
        """Let one tensor less read a buffer, whose bytes go with the last; return the index of no constant."""
        tensors = [tensor for graph in self.raw.subgraphs for tensor in graph.tensors if tensor.buffer == buffer]
        if len(tensors) <= 1:
            self.raw.buffers[buffer].data = None
        return 0

    def operator_code(self, name: str) -> int:
        """Return the index of an operator's code in this model, added where it has none."""
        number = getattr(self.schema.BuiltinOperator, name)
        for index, code in enumerate(self.raw.operatorCodes):
            if code.builtinCode == number:
                return index
        code = self.schema.OperatorCodeT()
        code.builtinCode, code.version = number, 3
        code.deprecatedBuiltinCode = min(number, 127)
        self.raw.operatorCodes.append(code)
        return len(self.raw.operatorCodes) - 1

    def pack(self) -> bytes:
        """Return the model as the bytes of a file."""
        builder = require("flatbuffers").Builder(self._size)
        builder.Finish(self.raw.Pack(builder), b"TFL3")
        return bytes(builder.Output())
