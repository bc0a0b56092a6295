"""Faults of one node or output that are planted into an ONNX graph, for benchmarks and tests of what finds them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from deploykit.arrays import Array
from deploykit.onnx_session import values_of

WEIGHTED = ("Conv", "Gemm", "MatMul")
ACTIVATIONS = ("Relu", "Clip", "HardSwish", "HardSigmoid", "Sigmoid", "Gelu", "Erf")
NORMALIZATIONS = ("InstanceNormalization", "GroupNormalization", "LayerNormalization", "RMSNormalization")
MOVES = ("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze")
OTHER_MODE = {"nearest": "linear", "linear": "nearest", "cubic": "linear"}

Plant = Callable[[ir.Model, ir.Node, Array], set[str]]
"""Change a graph, whose tensors say their types, at a node; return the nodes at which the fault may be found, none
where it has no place there. The array holds images as the graph takes them."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One kind of fault; ``operators`` are those that it can be planted at, none: any."""

    name: str
    plant: Plant
    operators: tuple[str, ...] = ()


def weight_of(node: ir.Node) -> ir.Value | None:
    """The constant that holds a node's weight: of the node itself, or of the DequantizeLinear before it."""
    value = node.inputs[1]
    source = value.producer() if value is not None else None
    if source is not None and source.op_type == "DequantizeLinear":
        value = source.inputs[0]
    return value if value is not None and value.const_value is not None and len(value.const_value.shape) > 1 else None


def _changed(value: ir.Value | None, change: Callable[[Array], Array], node: ir.Node) -> set[str]:
    """Replace a constant of a node; no place where it stays as it is, or where other nodes read it too."""
    if value is None or value.const_value is None or len(list(value.uses())) > 1:
        return set()
    before = value.const_value.numpy()
    after = change(before.copy()).astype(before.dtype)
    value.const_value = ir.tensor(np.ascontiguousarray(after), name=value.name)
    return set() if np.array_equal(before, after) else {str(node.name)}


def scaled(model: ir.Model, node: ir.Node, images: Array) -> set[str]:
    """The weight, or the scale of one in integers, times 1.01; not where a normalization divides it out again."""
    if _normalized(node.outputs[0]):
        return set()
    source = node.inputs[1].producer() if node.inputs[1] is not None else None
    value = source.inputs[1] if source is not None and source.op_type == "DequantizeLinear" else weight_of(node)
    return set() if weight_of(node) is None else _changed(value, lambda array: array * 1.01, node)


def _normalized(value: ir.Value) -> bool:
    """Whether a tensor is read by normalizations alone, through reshapes too."""
    readers = [usage.node for usage in value.uses()]
    return bool(readers) and all(
        reader.op_type in NORMALIZATIONS or (reader.op_type in MOVES and _normalized(reader.outputs[0]))
        for reader in readers
    )


def negated(model: ir.Model, node: ir.Node, images: Array) -> set[str]:
    """The weight with the other sign."""
    return _changed(
        weight_of(node), lambda array: np.maximum(array, -127 if array.dtype == np.int8 else array) * -1, node
    )


def swapped(model: ir.Model, node: ir.Node, images: Array) -> set[str]:
    """The weight with its first two output channels in each other's place."""
    value = weight_of(node)
    by_rows = node.op_type == "Gemm" and not node.attributes.get_int("transB", 0)
    axis = 1 if node.op_type == "MatMul" or by_rows else 0
    if value is None or value.const_value.shape[axis] < 2:
        return set()
    return _changed(value, lambda array: np.take(array, [1, 0, *range(2, array.shape[axis])], axis=axis), node)


def transposed_kernel(model: ir.Model, node: ir.Node, images: Array) -> set[str]:
    """The kernel with rows for columns."""
    value = weight_of(node)
    if value is None or len(value.const_value.shape) != 4 or value.const_value.shape[2] < 2:
        return set()
    return _changed(value, lambda array: array.swapaxes(2, 3), node)


def transposed_layout(model: ir.Model, node: ir.Node, images: Array) -> set[str]:
    """What a layer reads, its last two axes exchanged in memory and not in its shape."""
    value = node.inputs[0]
    sides = tuple(value.shape) if value is not None and value.shape is not None else ()
    if len(sides) < 3 or not all(isinstance(side, int) for side in sides[1:]) or 1 in sides[-2:]:
        return set()
    order = [*range(len(sides) - 2), len(sides) - 1, len(sides) - 2]
    turned = ir.node("Transpose", [value], {"perm": order}, name="planted/transpose")
    shape = ir.Value(name="planted/shape", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([len(sides)]))
    shape.const_value = ir.tensor(np.array([0, *sides[1:]], np.int64), name=shape.name)
    model.graph.initializers.add(shape)
    back = ir.node("Reshape", [turned.outputs[0], shape], name="planted/reshape")
    model.graph.insert_before(node, [turned, back])
    node.replace_input_with(0, back.outputs[0])
    return {str(node.name), "planted/transpose", "planted/reshape"}


def dropped(model: ir.Model, node: ir.Node, images: Array) -> set[str]:
    """An activation that is not there: what reads it reads what it read; it is found at its readers."""
    output = node.outputs[0]
    if output in set(model.graph.outputs):
        return set()
    names = {str(node.name)}
    for usage in output.uses():
        names |= {str(usage.node.name)} | {str(each.node.name) for each in usage.node.outputs[0].uses()}
    ir.convenience.replace_all_uses_with(output, node.inputs[0])
    model.graph.remove(node, safe=True)
    return names


def shifted(model: ir.Model, node: ir.Node, images: Array) -> set[str]:
    """The zero point of one dequantizer of activations, off by one."""
    point = node.inputs[2] if len(node.inputs) > 2 else None
    if node.inputs[0].const_value is not None or point is None or point.const_value is None:
        return set()
    array = point.const_value.numpy()
    if array.size != 1:
        return set()
    moved = ir.Value(name=f"{point.name}/moved", shape=point.shape, type=point.type)
    step = 1 if int(array) < np.iinfo(array.dtype).max else -1
    moved.const_value = ir.tensor(np.asarray(int(array) + step, array.dtype), name=moved.name)
    model.graph.initializers.add(moved)
    node.replace_input_with(2, moved)
    return {str(node.name)}


def resized(model: ir.Model, node: ir.Node, images: Array) -> set[str]:
    """A resize in another mode."""
    mode = node.attributes.get_string("mode", "nearest")
    node.attributes["mode"] = ir.AttrString("mode", OTHER_MODE[mode])
    return {str(node.name)}


def renamed(model: ir.Model, node: ir.Node, images: Array) -> set[str]:
    """An output under another name."""
    value = node.outputs[0]
    if value not in set(model.graph.outputs):
        return set()
    value.name = f"{value.name}_1"
    return {str(node.name)}


def exchanged(model: ir.Model, node: ir.Node, images: Array) -> set[str]:
    """Two outputs under each other's name."""
    value = node.outputs[0]
    others = [each for each in model.graph.outputs if each is not value and each.producer() is not None]
    if value not in set(model.graph.outputs) or not others:
        return set()
    other = others[0]
    names = value.name, other.name
    value.name = "planted/name"
    other.name, value.name = names
    return {str(node.name), str(other.producer().name)}


def stale(model: ir.Model, node: ir.Node, images: Array) -> set[str]:
    """An output that keeps its answer to the first images."""
    value, outputs = node.outputs[0], model.graph.outputs
    place = next((index for index, each in enumerate(outputs) if each is value), None)
    if place is None:
        return set()
    name = str(value.name)
    kept = ir.node("Constant", [], {"value": ir.tensor(values_of(model, [name], images)[name])}, name="planted/kept")
    value.name = "planted/computed"
    answer = kept.outputs[0]
    answer.name, answer.shape, answer.type = name, value.shape, value.type
    model.graph.insert_before(model.graph.node(0), kept)
    outputs[place] = answer
    return {"planted/kept"}


FAULTS = (
    Fault(name="weight x1.01", plant=scaled, operators=WEIGHTED),
    Fault(name="sign flip", plant=negated, operators=WEIGHTED),
    Fault(name="swapped channels", plant=swapped, operators=WEIGHTED),
    Fault(name="zero point off by one", plant=shifted, operators=("DequantizeLinear",)),
    Fault(name="wrong resize mode", plant=resized, operators=("Resize",)),
    Fault(name="dropped activation", plant=dropped, operators=ACTIVATIONS),
    Fault(name="renamed output", plant=renamed),
    Fault(name="swapped outputs", plant=exchanged),
    Fault(name="transposed layout", plant=transposed_layout, operators=WEIGHTED),
    Fault(name="transposed kernel", plant=transposed_kernel, operators=("Conv",)),
    Fault(name="stale output", plant=stale),
)
