"""An ONNX graph in the form that TensorRT reads as it is written: what can be rewritten is, the rest is refused.

Rewritten without changing a number: uint8 activations with zero point 0 to int8 at 255/127 of the
scale (TensorRT reads them as int8 at the same scale, with a warning), int32 biases to float,
absent zero points to written ones, and shapes and types that such rewriting leaves stale.
Runs before TensorRT's parser; `quantize_layers` is what the parsed network is compared with.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from typing import TYPE_CHECKING

import numpy as np

from deploykit.arrays import Array
from deploykit.errors import ExportError
from deploykit.optional import require

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

UINT8_TO_INT8 = 255 / 127
"""The largest uint8 over the largest int8: the same range of values in half the levels."""

_REFUSED_OPERATORS = re.compile(r"QLinear\w*|\w+Integer|DynamicQuantizeLinear")
_NEVER_NEGATIVE = ("Relu", "Sigmoid", "Softmax", "HardSigmoid", "Softplus", "Exp", "Abs")
_PAIR = ("QuantizeLinear", "DequantizeLinear")
_LISTED_FAULTS = 8
_REMEDIES = {
    "UINT8": "store it as int8 with zero point 0: subtract 128 from uint8 weights, or calibrate symmetrically",
    "INT16": "calibrate to 8 bits",
    "UINT16": "calibrate to 8 bits",
    "INT32": "leave it in float",
}


def prepare(model: ir.Model | onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of a graph as TensorRT reads it.

    Raises:
        ExportError: naming every node that TensorRT refuses or would read as another type.
    """
    proto = model if isinstance(model, require("onnx").ModelProto) else require("onnx_ir").to_proto(model)
    ready = rewrite(proto)
    check_quantization(ready)
    return ready


def rewrite(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy with the forms rewritten that have an exact equivalent; others stay as they are."""
    onnx_module = require("onnx")
    copy: onnx.ModelProto = onnx_module.ModelProto()
    copy.CopyFrom(model)
    _Rewriter(copy).run()
    return copy


def check_quantization(model: onnx.ModelProto) -> None:
    """Refuse what TensorRT refuses, or what it reads as another type without saying so.

    Raises:
        ExportError: naming each node with its remedy: QLinear, Integer and dynamic operators; a zero
            point that is missing (ONNX then means uint8), not constant, not INT8, or not 0.
    """
    constants = _constants(model.graph)
    faults = [fault for node in model.graph.node if (fault := _fault(node, constants))]
    if faults:
        listed = "".join(f"\n  {fault}" for fault in faults[:_LISTED_FAULTS])
        more = f"\n  and {len(faults) - _LISTED_FAULTS} more" if len(faults) > _LISTED_FAULTS else ""
        raise ExportError(
            f"TensorRT takes Q/DQ nodes only as signed INT8 with zero point 0; found:{listed}{more}\n"
            "Quantize with the tensorrt dialect, which writes them so."
        )


def quantize_layers(model: onnx.ModelProto) -> dict[str, int]:
    """Return how many Q and DQ nodes a graph has, by the type of their integers, as ONNX defines it."""
    onnx_module = require("onnx")
    constants = _constants(model.graph)
    counts: Counter[str] = Counter()
    for node in model.graph.node:
        if node.op_type in _PAIR:
            zero = constants.get(node.input[2]) if len(node.input) > 2 else None
            kind = zero.data_type if zero is not None else _written_type(node) or onnx_module.TensorProto.UINT8
            counts[f"{node.op_type} {onnx_module.TensorProto.DataType.Name(kind)}"] += 1
    return dict(counts)


def _fault(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto]) -> str | None:
    where = f"{node.op_type} {node.name or node.output[0]}"
    if _REFUSED_OPERATORS.fullmatch(node.op_type):
        return f"{where}: the operator is refused; quantize the float graph with Q/DQ nodes instead"
    problem = _zero_point_fault(node, constants) if node.op_type in _PAIR else None
    return f"{where}: {problem}" if problem else None


def _zero_point_fault(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto]) -> str | None:
    onnx_module = require("onnx")
    if len(node.input) < 3 or not node.input[2]:
        written = _written_type(node) == onnx_module.TensorProto.INT8
        return None if written else "no zero point is written, which means uint8; write an int8 zero"
    zero = constants.get(node.input[2])
    if zero is None:
        return "the zero point is computed; make it a constant int8 zero"
    if zero.data_type != onnx_module.TensorProto.INT8:
        kind = onnx_module.TensorProto.DataType.Name(zero.data_type)
        weight = " of a weight" if node.op_type == "DequantizeLinear" and node.input[0] in constants else ""
        return f"the zero point{weight} is not INT8 but {kind}; {_REMEDIES.get(kind, 'use int8')}"
    return "the zero point is not 0; calibrate symmetrically" if onnx_module.numpy_helper.to_array(zero).any() else None


class _Rewriter:
    """One rewriting of a graph in place; every index is built once, before anything changes."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.onnx = require("onnx")
        self.numpy_helper = require("onnx.numpy_helper")
        self.graph = model.graph
        self.constants = _constants(model.graph)
        self.producers = {name: node for node in model.graph.node for name in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in model.graph.node:
            for name in node.input:
                self.readers[name].append(node)
        self.outputs = {value.name for value in model.graph.output}
        self.before: dict[str, onnx.NodeProto] = {}
        self.removed: set[str] = set()

    def run(self) -> None:
        pairs = [node for node in self.graph.node if node.op_type in _PAIR]
        for node in pairs:
            self._write_zero_point(node)
        for node in pairs:
            if node.op_type == "QuantizeLinear":
                self._sign(node)
            else:
                self._float_bias(node)
        nodes = []
        for node in self.graph.node:
            if node.output[0] in self.removed:
                continue
            if node.output[0] in self.before:
                nodes.append(self.before[node.output[0]])
            nodes.append(node)
        kept = self.onnx.GraphProto(node=nodes).node
        del self.graph.node[:]
        self.graph.node.extend(kept)
        del self.graph.value_info[:]
        self._drop_unread()

    def _write_zero_point(self, node: onnx.NodeProto) -> None:
        scale = self.constants.get(node.input[1])
        if (len(node.input) > 2 and node.input[2]) or scale is None:
            return
        kind = self._integers_of(node)
        if kind is None:
            return
        name = self._add(f"{node.output[0]}/zero_point", np.zeros(tuple(scale.dims)), kind)
        del node.input[2:]
        node.input.append(name)

    def _integers_of(self, node: onnx.NodeProto) -> int | None:
        """Return the type of a pair node's integers where no zero point tells it."""
        if node.op_type == "QuantizeLinear":
            return _written_type(node) or int(self.onnx.TensorProto.UINT8)
        if node.input[0] in self.constants:
            return int(self.constants[node.input[0]].data_type)
        writer = self.producers.get(node.input[0])
        if writer is None or writer.op_type != "QuantizeLinear":
            return None
        zero = self.constants.get(writer.input[2]) if len(writer.input) > 2 else None
        return int(zero.data_type) if zero is not None else None

    def _sign(self, quantize: onnx.NodeProto) -> None:
        """uint8 with zero point 0 -> Relu where needed, then int8 with zero point 0 at 255/127 of the scale."""
        readers = self.readers[quantize.output[0]]
        nodes = [quantize, *readers]
        alone = quantize.output[0] not in self.outputs and all(node.op_type == "DequantizeLinear" for node in readers)
        if not alone or not all(self._is_unsigned_zero(node) and node.input[1] in self.constants for node in nodes):
            return
        if not self._never_negative(quantize.input[0]):
            clamp = self.onnx.helper.make_node(
                "Relu", [quantize.input[0]], [f"{quantize.output[0]}/positive"], name=f"{quantize.output[0]}/positive"
            )
            self.before[quantize.output[0]] = clamp
            quantize.input[0] = clamp.output[0]
        for node in nodes:
            scale = self.constants[node.input[1]]
            values = self.numpy_helper.to_array(scale).astype(np.float64) * UINT8_TO_INT8
            zeros = np.zeros(values.shape)
            node.input[2] = self._add(f"{node.input[1]}/int8_zero", zeros, self.onnx.TensorProto.INT8)
            node.input[1] = self._add(f"{node.input[1]}/int8", values, scale.data_type)
            kept = [attribute for attribute in node.attribute if attribute.name != "output_dtype"]
            del node.attribute[:]
            node.attribute.extend(kept)

    def _float_bias(self, node: onnx.NodeProto) -> None:
        """An int32 constant behind a DequantizeLinear -> the float constant that it stands for."""
        integers, scale = self.constants.get(node.input[0]), self.constants.get(node.input[1])
        zero = self.constants.get(node.input[2]) if len(node.input) > 2 else None
        if integers is None or scale is None or zero is None or integers.data_type != self.onnx.TensorProto.INT32:
            return
        values, scales = self.numpy_helper.to_array(integers), self.numpy_helper.to_array(scale)
        axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
        if scales.size > 1:
            shape = [1] * values.ndim
            shape[axis] = -1
            scales = scales.reshape(shape)
        exact = (values.astype(np.float64) - self.numpy_helper.to_array(zero)) * scales
        self._add(node.output[0], exact, scale.data_type)
        self.removed.add(node.output[0])

    def _is_unsigned_zero(self, node: onnx.NodeProto) -> bool:
        zero = self.constants.get(node.input[2]) if len(node.input) > 2 else None
        return (
            zero is not None
            and zero.data_type == self.onnx.TensorProto.UINT8
            and not self.numpy_helper.to_array(zero).any()
        )

    def _never_negative(self, name: str) -> bool:
        node = self.producers.get(name)
        if node is None:
            return False
        if node.op_type == "Clip":
            low = self.constants.get(node.input[1]) if len(node.input) > 1 else None
            return low is not None and bool((self.numpy_helper.to_array(low) >= 0).all())
        return node.op_type in _NEVER_NEGATIVE

    def _add(self, name: str, values: Array, kind: int) -> str:
        if name not in self.constants:
            dtype = self.onnx.helper.tensor_dtype_to_np_dtype(kind)
            self.constants[name] = tensor = self.numpy_helper.from_array(np.asarray(values).astype(dtype), name)
            self.graph.initializer.append(tensor)
        return name

    def _drop_unread(self) -> None:
        read = {name for node in self.graph.node for name in node.input} | self.outputs
        kept = [tensor for tensor in self.graph.initializer if tensor.name in read]
        if len(kept) < len(self.graph.initializer):
            kept = list(self.onnx.GraphProto(initializer=kept).initializer)
            del self.graph.initializer[:]
            self.graph.initializer.extend(kept)


def _constants(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            constants[node.output[0]] = node.attribute[0].t
    return constants


def _written_type(node: onnx.NodeProto) -> int | None:
    """Return the ``output_dtype`` of a QuantizeLinear, where it is written."""
    return next((int(each.i) for each in node.attribute if each.name == "output_dtype" and each.i), None)
