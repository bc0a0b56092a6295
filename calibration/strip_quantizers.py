"""DequantizeLinear(QuantizeLinear(x)) -> x, DequantizeLinear(integers) -> float constant: what was quantized, apart.

Takes graphs of any quantizer: pairs may stand before or behind an activation, be shared by readers or be one a reader,
and weights may be integers behind a DequantizeLinear or floats behind a pair.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from deploykit.calibration.quantizer_nodes import (
    UINT8_ZERO,
    Array,
    along,
    as_int8,
    axis_of,
    check_pair,
    check_types,
    is_integer_operator,
    listed,
    parameters,
)
from deploykit.errors import QuantizedModelError
from deploykit.onnx_values import add_constant, array_of

DEAD_SHARE = 1e-2
"""A channel that was zero in all calibration images has a scale below this share of the largest, and any zero point."""
CLIP_INPUTS_OPSET = 11
_NOT_NEGATIVE = frozenset({"Relu", "Clip", "Sigmoid", "HardSigmoid", "Softmax", "Abs"})


@dataclass(frozen=True, kw_only=True)
class TensorQuantizer:
    """The scale and the uint8 zero point of an activation: ``x = (q - zero_point) * scale``, q in 0..255."""

    scale: float
    zero_point: int


@dataclass(frozen=True, kw_only=True, eq=False)
class WeightQuantizer:
    """The integers of a weight, int8 of its shape, with scales and zero points ``(channels,)`` or ``(1,)``."""

    integers: npt.NDArray[np.int8]
    scales: npt.NDArray[np.float32]
    zero_points: npt.NDArray[np.int64]
    axis: int

    def scaled(self, factors: npt.NDArray[np.float32]) -> WeightQuantizer:
        """Return the same integers of a weight that is multiplied along its first axis, ``(channels,)``.

        Raises:
            QuantizedModelError: the scales are those of another axis.
        """
        if self.scales.size > 1 and self.axis != 0:
            raise QuantizedModelError(
                f"a convolution's weight has scales along axis {self.axis}; expected its output channels, axis 0."
            )
        along = np.broadcast_to(self.zero_points, factors.shape)
        return replace(self, scales=(self.scales * factors).astype(np.float32), zero_points=along, axis=0)


@dataclass(kw_only=True)
class Stripped:
    """The float graph, and the quantizers that it had: of activations by tensor, of weights by initializer.

    ``channel_scales`` are those of activations with one scale a channel, whose zero points are 0. ``ignored`` says
    which quantizers were left out because their tensor has another already.
    """

    model: ir.Model
    activations: dict[str, TensorQuantizer] = field(default_factory=dict)
    weights: dict[str, WeightQuantizer] = field(default_factory=dict)
    channel_scales: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)


def strip_quantizers(model: ir.Model) -> Stripped:
    """Take every quantizer out of a copy of a graph.

    Args:
        model: constants are initializers, functions inlined; see `deploykit.export.quantized_file`.

    Raises:
        QuantizedModelError: quantizers that a plan has no place for; each one is named.
    """
    found = Stripped(model=model.clone())
    graph = found.model.graph
    problems = [f"{node.name} ({node.op_type})" for node in graph if is_integer_operator(node)]
    if problems:
        raise QuantizedModelError(
            f"the graph computes with integer operators: {listed(problems)}. Expected QuantizeLinear and "
            "DequantizeLinear around float operators. Fix: quantize it in the Q/DQ format (QuantFormat.QDQ)."
        )
    check_types(graph)
    for node in [each for each in graph if each.op_type == "DequantizeLinear"]:
        _strip(node, found)
    _remove_unread(graph)
    left = [f"{node.name}" for node in graph if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    if left:
        raise QuantizedModelError(
            f"the integers of {listed(left)} are read by something else than a DequantizeLinear. Fix: quantize the "
            "float model in the Q/DQ format."
        )
    return found


def _strip(dequantize: ir.Node, found: Stripped) -> None:
    source = dequantize.inputs[0]
    quantize = source.producer() if source is not None else None
    if source is not None and source.is_initializer():
        replacement = _constant(dequantize, array_of(source), found)
    elif quantize is not None and quantize.op_type == "QuantizeLinear":
        check_pair(quantize, dequantize)
        value = quantize.inputs[0]
        assert value is not None  # noqa: S101  (an operand that the operator requires; narrows the type)
        if value.is_initializer():
            replacement = _rounded_constant(quantize, value, found)
        else:
            replacement = _activation(quantize, value, found)
    else:
        raise QuantizedModelError(
            f"{dequantize.name} restores integers that neither a QuantizeLinear nor a constant gives. Fix: quantize "
            "the float model in the Q/DQ format."
        )
    restored = dequantize.outputs[0]
    for use in list(restored.uses()):
        use.node.replace_input_with(use.idx, replacement)
    if restored.is_graph_output():
        _take_over_output(found, restored, replacement)


def _activation(quantize: ir.Node, value: ir.Value, found: Stripped) -> ir.Value:
    """Note an activation's quantizer; where it cuts negative numbers off, a Clip does so in the float graph."""
    scale, zero_point = parameters(quantize)
    if scale.size != 1:
        return _channels_activation(quantize, value, found)
    own = TensorQuantizer(scale=float(scale.reshape(-1)[0]), zero_point=int(zero_point.reshape(-1)[0]))
    value = _clipped(value, own, found.model) if own.zero_point == 0 else value
    known = found.activations.setdefault(str(value.name), own)
    if known != own:
        found.ignored.append(f"{quantize.name}: {value.name} has another scale already")
    return value


def _channels_activation(quantize: ir.Node, value: ir.Value, found: Stripped) -> ir.Value:
    """Note an activation's scales by channel; `deploykit.calibration.channel_scales` makes one of them."""
    scale, zero_point = parameters(quantize)
    dead = (zero_point == UINT8_ZERO) & (scale < DEAD_SHARE * scale.max())
    scale = np.where(dead, scale * np.float32(127 / 255), scale).astype(np.float32)
    zero_point = np.where(dead, 0, zero_point)
    if zero_point.any() or axis_of(quantize, 4) != 1:
        raise QuantizedModelError(
            f"{quantize.name} quantizes the activation {value.name} with {scale.size} scales and zero points "
            f"{int(zero_point.min())} to {int(zero_point.max())} along axis {axis_of(quantize, 4)}; expected one scale "
            "a tensor, or one a channel without zero points. Fix: quantize activations per tensor."
        )
    value = _clipped(value, TensorQuantizer(scale=float(scale.max()), zero_point=0), found.model)
    known = found.channel_scales.setdefault(str(value.name), scale)
    if not np.array_equal(known, scale):
        found.ignored.append(f"{quantize.name}: {value.name} has other scales already")
    return value


def _clipped(value: ir.Value, quantizer: TensorQuantizer, model: ir.Model) -> ir.Value:
    """Return a value cut off where integers without a zero point end, if it may be negative.

    Quantizers take the place of a ReLU or ReLU6, whose bounds are theirs, and the activation is removed then.
    """
    producer = value.producer()
    if producer is None or _is_not_negative(value):
        return value
    name = f"{value.name}/clipped"
    for reader in value.consumers():
        if reader.name == name:
            return reader.outputs[0]
    clip = _clip(value, {"min": 0.0, "max": 255 * quantizer.scale}, name, model)
    clip.outputs[0].name = name
    clip.outputs[0].shape, clip.outputs[0].type = value.shape, value.type
    model.graph.insert_after(producer, clip)
    return clip.outputs[0]


def _clip(value: ir.Value, bounds: dict[str, float], name: str, model: ir.Model) -> ir.Node:
    """Return a Clip, whose bounds are attributes before opset 11 and inputs since."""
    if model.opset_imports.get("", CLIP_INPUTS_OPSET) < CLIP_INPUTS_OPSET:
        return ir.node("Clip", [value], bounds, name=name)
    graph = model.graph
    constants = [
        graph.initializers.get(f"{name}/{end}") or add_constant(graph, f"{name}/{end}", np.array(bound, np.float32))
        for end, bound in bounds.items()
    ]
    return ir.node("Clip", [value, *constants], name=name)


def _is_not_negative(value: ir.Value | None) -> bool:
    """Return whether a value is never negative, as far as the nodes behind it say."""
    producer = value.producer() if value is not None else None
    if producer is None:
        return False
    if producer.op_type in _NOT_NEGATIVE:
        return producer.op_type != "Clip" or _least(producer) >= 0
    if producer.op_type in KEEPS_RANGE or producer.op_type in ("GlobalAveragePool", "AveragePool", "ReduceMean"):
        return _is_not_negative(producer.inputs[0])
    return producer.op_type in ("Add", "Mul") and all(_is_not_negative(each) for each in producer.inputs)


def _least(clip: ir.Node) -> float:
    low = clip.inputs[1] if len(clip.inputs) > 1 else None
    if low is None or low.const_value is None:
        return clip.attributes.get_float("min", -np.inf)  # where its bounds stand before opset 11
    return float(low.const_value.numpy())


KEEPS_RANGE = frozenset(
    {"Dropout", "Flatten", "Identity", "MaxPool", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"}
)
"""Operators whose output has no values that their first input has not."""


def _constant(dequantize: ir.Node, integers: Array, found: Stripped) -> ir.Value:
    """Return the float constant that integers stand for; those of 8 bits are a weight's."""
    scale, zero_point = parameters(dequantize)
    axis = axis_of(dequantize, integers.ndim)
    if integers.dtype == np.int32:
        offset: Array = np.zeros(scale.size, np.int64)
    else:
        integers, offset = as_int8(integers, zero_point)
    restored = (integers - along(offset, integers, axis)) * along(scale, integers, axis)
    name = str(dequantize.outputs[0].name)
    value = add_constant(found.model.graph, f"{name}/float", restored.astype(np.float32))
    if integers.dtype == np.int8:
        found.weights[str(value.name)] = WeightQuantizer(integers=integers, scales=scale, zero_points=offset, axis=axis)
    return value


def _rounded_constant(quantize: ir.Node, value: ir.Value, found: Stripped) -> ir.Value:
    """Note the integers of a float weight that stands behind a pair; the graph keeps the float one."""
    scale, zero_point = parameters(quantize)
    weight = array_of(value)
    axis = axis_of(quantize, weight.ndim)
    rounded = np.round(weight / along(scale, weight, axis)) + along(zero_point, weight, axis)
    integers, offset = as_int8(np.clip(rounded, 0, 255).astype(np.uint8), zero_point)
    found.weights[str(value.name)] = WeightQuantizer(integers=integers, scales=scale, zero_points=offset, axis=axis)
    return value


def _take_over_output(found: Stripped, old: ir.Value, new: ir.Value) -> None:
    """Let a value be the graph's output, under the output's name."""
    graph = found.model.graph
    if new.is_graph_output() or new.is_graph_input() or new.is_initializer():
        identity = ir.node("Identity", [new], name=f"{old.name}/identity")
        graph.append(identity)
        new = identity.outputs[0]
    new.shape, new.type = old.shape, old.type
    graph.outputs[list(graph.outputs).index(old)] = new
    name = old.name
    old.name = f"{name}/restored"
    if str(new.name) in found.activations:
        found.activations[str(name)] = found.activations.pop(str(new.name))
    new.name = name


def _remove_unread(graph: ir.Graph) -> None:
    """Remove nodes and initializers that nothing reads any more."""
    for node in reversed(list(graph)):
        if not any(value.uses() or value.is_graph_output() for value in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]
