"""What the constants and shapes of an ONNX graph hold, for passes that know that they are there."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from deploykit.arrays import Array, FloatArray


def tensor_of(value: ir.Value | None) -> ir.TensorProtocol:
    """Return the tensor of an initializer."""
    assert value is not None and value.const_value is not None  # noqa: S101  (narrows the type)
    return value.const_value


def array_of(value: ir.Value | None) -> Array:
    """Return the array of an initializer."""
    return tensor_of(value).numpy()


def floats_of(value: ir.Value | None) -> FloatArray:
    """Return the array of an initializer in float32; that of a master graph is not copied."""
    return np.asarray(array_of(value), np.float32)


def add_constant(graph: ir.Graph, name: str, array: Array) -> ir.Value:
    """Register an array as an initializer of a graph."""
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def shape_of_value(value: ir.Value | None) -> ir.Shape:
    """Return the shape of a value whose shape has to be known; its sizes may have names."""
    assert value is not None and value.shape is not None  # noqa: S101  (narrows the type)
    return value.shape


def sizes_of_constant(value: ir.Value | None) -> tuple[int, ...]:
    """Return the sizes of an initializer, all of which are numbers."""
    return tuple(side for side in shape_of_value(value) if isinstance(side, int))


def written_by(value: ir.Value) -> ir.Node:
    """Return the node that writes a value which is neither an input of the graph nor a constant."""
    node = value.producer()
    assert node is not None  # noqa: S101  (narrows the type)
    return node
