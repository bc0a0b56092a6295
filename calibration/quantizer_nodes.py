"""Read QuantizeLinear and DequantizeLinear nodes: their integers' type, scales, zero points and axis."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from deploykit.errors import QuantizedModelError

UINT8_ZERO = 128
"""What is added to int8 to make uint8 of it."""
_FLOAT_OF_INTEGERS = frozenset({"ConvInteger", "DynamicQuantizeLinear", "MatMulInteger", "DynamicQuantizeMatMul"})
_INTEGERS = frozenset({ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT32})

Array = npt.NDArray[Any]


def as_int8(integers: Array, zero_point: Array) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.int64]]:
    """Return 8-bit integers as int8, and their zero points, which `parameters` gives for uint8, with them."""
    shifted = integers.astype(np.int16) - (UINT8_ZERO if integers.dtype == np.uint8 else 0)
    return shifted.astype(np.int8), zero_point - UINT8_ZERO


def parameters(node: ir.Node) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Return the scales of a Q or DQ node and its zero points as of uint8, flat."""
    scale_value, zero_value = node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None
    if (
        scale_value is None
        or scale_value.const_value is None
        or (zero_value is not None and zero_value.const_value is None)
    ):
        raise QuantizedModelError(
            f"{node.name} takes its scale from a computation; expected a constant. Fix: use static quantization."
        )
    scale = np.asarray(scale_value.const_value.numpy(), np.float32).reshape(-1)
    if not np.isfinite(scale).all() or not (scale > 0).all():
        raise QuantizedModelError(f"{node.name} has a scale that is not a positive number. Fix: quantize it again.")
    if zero_value is None or zero_value.const_value is None:
        return scale, np.full(scale.size, UINT8_ZERO if integer_type(node) == ir.DataType.INT8 else 0, np.int64)
    zero = zero_value.const_value.numpy()
    shift = UINT8_ZERO if zero.dtype == np.int8 else 0
    return scale, np.broadcast_to(zero.astype(np.int64).reshape(-1) + shift, scale.shape).copy()


def integer_type(node: ir.Node) -> ir.DataType:
    """Return the type of the integers that a Q node gives or a DQ node takes; uint8 where nothing says it.

    A zero point says it, or since opset 21 a QuantizeLinear's ``output_dtype``; a DequantizeLinear's is that of its
    floats (opset 23).
    """
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    if zero is not None and zero.dtype is not None:
        return zero.dtype
    integers = node.outputs[0]
    if node.op_type == "DequantizeLinear":
        source = node.inputs[0]
        producer = source.producer() if source is not None else None
        if producer is not None and producer.op_type == "QuantizeLinear":
            return integer_type(producer)
        if source is None:
            return ir.DataType.UINT8
        integers = source
    elif asked := node.attributes.get_int("output_dtype", 0):
        return ir.DataType(asked)
    return integers.dtype if integers.dtype is not None else ir.DataType.UINT8


def axis_of(node: ir.Node, rank: int) -> int:
    """Return the axis that the scales of a Q or DQ node go along, 0 or more."""
    return node.attributes.get_int("axis", 1) % max(1, rank)


def along(channels: Array, weight: Array, axis: int) -> Array:
    """Return one value, or one a channel, in a shape that goes with a weight."""
    if channels.size == 1:
        return channels.reshape(())
    shape = [1] * weight.ndim
    shape[axis] = -1
    return channels.reshape(shape)


def is_integer_operator(node: ir.Node) -> bool:
    """Return whether a node computes with integers itself, which the Q/DQ format has none of."""
    plain = node.op_type in ("QuantizeLinear", "DequantizeLinear")
    return not plain and (
        node.op_type in _FLOAT_OF_INTEGERS or node.op_type.startswith(("QLinear", "QGemm", "QAttention"))
    )


def check_types(graph: ir.Graph) -> None:
    """Refuse integers of other widths, floats of 8 or 16 bits, and scales by blocks.

    Raises:
        QuantizedModelError: some are there; each is named.
    """
    problems = []
    for node in graph:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        if (kind := integer_type(node)) not in _INTEGERS:
            problems.append(f"{node.name} has {kind}")  # such as INT16, INT4 or FLOAT8E4M3FN
        if (real := _float_type(node)) != ir.DataType.FLOAT:
            problems.append(f"{node.name} is between integers and {real}")
        if node.attributes.get_int("block_size", 0):
            problems.append(f"{node.name} has one scale a block of {node.attributes.get_int('block_size', 0)}")
    if problems:
        raise QuantizedModelError(
            f"the graph has quantizers that a plan of 8-bit integers has no place for: {listed(problems)}. Fix: "
            "quantize a float32 model to int8 or uint8, weights per channel or per tensor."
        )


def _float_type(node: ir.Node) -> ir.DataType:
    """Return the type of the floats that a Q node takes or a DQ node gives: since opset 19 that of its scale."""
    asked = node.attributes.get_int("output_dtype", 0) if node.op_type == "DequantizeLinear" else 0
    scale = node.inputs[1]
    if asked:
        return ir.DataType(asked)
    return scale.dtype if scale is not None and scale.dtype is not None else ir.DataType.FLOAT


def check_pair(quantize: ir.Node, dequantize: ir.Node) -> None:
    """Refuse a pair whose halves differ.

    Raises:
        QuantizedModelError: they do, so that its integers are rescaled.
    """
    scale, zero_point = parameters(quantize)
    other_scale, other_zero_point = parameters(dequantize)
    if not np.array_equal(scale, other_scale) or not np.array_equal(zero_point, other_zero_point):
        raise QuantizedModelError(
            f"{quantize.name} and {dequantize.name} differ in scale or zero point: the integers are rescaled between "
            "them. Fix: quantize the float model in the Q/DQ format."
        )


def listed(problems: list[str], most: int = 8) -> str:
    """Return the first problems in one line, and how many more there are."""
    return ", ".join(problems[:most]) + (f", and {len(problems) - most} more" if len(problems) > most else "")
