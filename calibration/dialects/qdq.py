"""Q/DQ nodes from a quantization plan: the part that the ONNX dialects share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes

from deploykit.calibration.dialects.attention import quantize_attentions
from deploykit.calibration.dialects.dynamic import quantize_product
from deploykit.calibration.dialects.gates import before_saturation, fold_hard_sigmoids, prepare
from deploykit.calibration.dialects.left_out import leave_out
from deploykit.calibration.dialects.pointwise import linears_to_convolutions
from deploykit.calibration.dialects.tokens import maps_to_tokens
from deploykit.calibration.dialects.widths import widen
from deploykit.calibration.placement import IntegerWeight
from deploykit.calibration.plan import QuantizationPlan, add_constant

BIAS_LIMIT = 2**30
"""The largest int32 bias: the other half of the accumulator is for the products."""


@dataclass(frozen=True, kw_only=True)
class QdqStyle:
    """Where a runtime wants Q/DQ nodes, and of which type.

    ``symmetric``: activations int8 with zero point 0, instead of uint8 with any. ``all_writes``:
    also on what a convolution writes for float nodes to read. ``integer_bias``: biases int32.
    ``drop_activations``: leave out a Relu or Clip that the quantized range does by itself.
    ``integer_gates``: also on hard-swish, SiLU, squeeze-and-excitation and its pooling.
    ``dynamic_products``: matrix products quantize what they read at each call, instead of with the
    plan's range. ``before_rolls``: round a rolled map before it is cut and joined, not after.
    ``wide_groups``: join narrow groups, and pad depthwise convolutions to full vectors. ``float_image_side``:
    leave the stem and what is right behind it in float. ``pointlike_weights``: the fewest weights with which a
    convolution on a 1x1 map runs in integers; None: none of them does. ``linears_as_convolutions``: write linear
    layers of tokens as 1x1 convolutions. ``maps_as_tokens``: give maps with the channels last one dimension for
    their places.
    """

    symmetric: bool
    all_writes: bool
    integer_bias: bool
    drop_activations: bool
    integer_gates: bool = False
    dynamic_products: bool = False
    before_rolls: bool = False
    wide_groups: bool = False
    float_image_side: bool = False
    pointlike_weights: int | None = None
    linears_as_convolutions: bool = False
    maps_as_tokens: bool = False

    def as_rendered(self, model: onnx.ModelProto, plan: QuantizationPlan) -> QuantizationPlan:
        """The part of a plan that this style writes in integers, the rest with the reason why not."""
        return leave_out(model, plan, image_side=self.float_image_side, pointlike_weights=self.pointlike_weights)


def insert_qdq(model: onnx.ModelProto, plan: QuantizationPlan, style: QdqStyle) -> onnx.ModelProto:
    """A copy of a master graph (or a part of it) with the plan's Q/DQ nodes."""
    plan = style.as_rendered(model, plan)
    if style.wide_groups:
        model, plan = widen(model, plan)
    if style.maps_as_tokens:
        model = maps_to_tokens(model, plan.placement)
    return _Renderer(model, plan, style).render()


class _Renderer:
    """One rendering: the graph being rewritten and what has been inserted."""

    def __init__(self, model: onnx.ModelProto, plan: QuantizationPlan, style: QdqStyle) -> None:
        self.model = ir.from_proto(model)
        self.graph = self.model.graph
        self.plan = plan
        self.style = style
        self._offsets: dict[str, float] = {}
        self.values = {value.name: value for value in self.graph.inputs}
        self.values |= {value.name: value for node in self.graph for value in node.outputs}

    def render(self) -> onnx.ModelProto:
        placement = self.plan.placement
        if self.style.dynamic_products:
            quantize_attentions(self.model, self.plan)
        nodes = {node.name: node for node in self.graph}
        if self.style.integer_gates:
            self._offsets = fold_hard_sigmoids(self.graph, placement)
        for name, use in placement.weights.items():
            if name in nodes:
                self._quantize_weight(nodes[name], use)
        folded = {placement.weights[name].output for name in self._offsets}
        writes = [name for name in placement.writes if name not in folded] if self.style.all_writes else []
        gated = placement.between if self.style.integer_gates else ()
        self._everywhere = {*placement.writes, *gated}
        for name in gated:
            if name in self.values:
                self.values[name] = prepare(self.graph, self.values[name])
        for name in dict.fromkeys((*placement.reads, *writes, *gated)):
            if name in self.values:
                self._quantize_activation(self.values[name])
        if self.style.linears_as_convolutions:
            linears_to_convolutions(self.graph)
        self.graph.sort()
        passes.RemoveUnusedNodesPass()(self.model)
        for node in self.graph:
            for value in node.outputs:
                if not value.is_graph_output():
                    value.shape = value.type = None  # stale ones mislead TensorRT's parser
        return ir.to_proto(self.model)

    def _quantize_weight(self, node: ir.Node, use: IntegerWeight) -> None:
        name, weight = str(node.name), self.graph.initializers[use.weight]
        assert weight.const_value is not None  # noqa: S101  (an initializer has a value; narrows the type)
        values = weight.const_value.numpy()
        bias = self._corrected_bias(node, use, values.shape[use.axis])
        integer_bias = self.style.integer_bias and node.op_type == "Conv"
        step = np.float32(self.plan.range_of(use.input).affine()[0])
        least = np.abs(bias) / (step * BIAS_LIMIT) if integer_bias and bias is not None else None
        integers, scales = self.plan.integers_of(name, values, use.axis, least)
        if bias is not None:
            self._replace_bias(node, use, bias, step * scales if integer_bias else None)
        if self.style.dynamic_products and node.op_type != "Conv":
            quantize_product(self.graph, node, integers, scales)
        else:
            zeros = np.zeros(len(scales), np.int8)
            node.replace_input_with(1, self._dequantize(name, integers, scales, zeros, axis=use.axis))
        if not list(weight.consumers()):
            del self.graph.initializers[use.weight]

    def _corrected_bias(self, node: ir.Node, use: IntegerWeight, channels: int) -> npt.NDArray[np.float32] | None:
        """The bias with the plan's correction; None where there is none to write."""
        shift = np.asarray(self.plan.bias_shift.get(str(node.name), 0.0), np.float32)
        shift = shift + np.float32(self._offsets.get(str(node.name), 0.0))
        old = self.graph.initializers.get(use.bias) if use.bias else None
        if old is None and (node.op_type == "MatMul" or not np.any(shift)):
            return None
        bias = np.zeros(channels, np.float32) if old is None else old.const_value.numpy()  # type: ignore[union-attr]
        return np.asarray(bias + shift, np.float32)

    def _replace_bias(
        self,
        node: ir.Node,
        use: IntegerWeight,
        bias: npt.NDArray[np.float32],
        steps: npt.NDArray[np.float32] | None,
    ) -> None:
        """Write the bias as int32 in these steps, or as float without."""
        if steps is not None:
            integers = np.round(bias / steps.astype(np.float64)).astype(np.int32)
            value = self._dequantize(f"{node.name}/bias", integers, steps, np.zeros(len(steps), np.int32), axis=0)
        else:
            value = self._constant(f"{node.name}/bias", bias)
        if node.op_type == "MatMul":
            add = next(iter(node.outputs[0].consumers()))
            add.replace_input_with([operand.name for operand in add.inputs if operand].index(use.bias), value)
        elif len(node.inputs) > 2:
            node.replace_input_with(2, value)
        else:
            node.resize_inputs(3)
            node.replace_input_with(2, value)

    def _quantize_activation(self, value: ir.Value) -> None:
        """Put a Q/DQ pair behind a tensor: for all its readers, or for integer kernels where the writer is float."""
        tensor = str(value.name)
        scale, zero_point = self._parameters(value)
        everyone = tensor in self._everywhere
        readers = [use for use in value.uses() if everyone or use.node.name in self.plan.placement.weights]
        if not readers and not value.is_graph_output():
            return
        source = self._without_activation(value, zero_point) if everyone else value
        alone = len(readers) == len(list(value.uses())) and not value.is_graph_output()
        pieces = _rolled_pieces(source) if self.style.before_rolls and alone and not everyone else []
        constants = (self._constant(f"{tensor}/scale", scale), self._constant(f"{tensor}/zero_point", zero_point))
        start = pieces[0].inputs[0] if pieces else source
        quantize = ir.node("QuantizeLinear", [start, *constants], name=f"{tensor}/quantize")
        integers = quantize.outputs[0]
        integers.name = f"{tensor}/integers"
        for piece in pieces:
            piece.replace_input_with(0, integers)
        if pieces:
            integers = source  # cut and joined, the integers arrive where the floats did
        dequantize = ir.node("DequantizeLinear", [integers, *constants], name=f"{tensor}/dequantize")
        restored = dequantize.outputs[0]
        restored.name = f"{tensor}/restored"
        self.graph.extend([quantize, dequantize])
        for reader in readers:
            reader.node.replace_input_with(reader.idx, restored)
        if everyone and value.is_graph_output():
            self._take_over_output(value, restored)

    def _take_over_output(self, value: ir.Value, restored: ir.Value) -> None:
        """Let the restored integers be the graph's output, so that the kernel before can write integers."""
        name = value.name
        restored.shape, restored.type = value.shape, value.type
        self.graph.outputs[list(self.graph.outputs).index(value)] = restored
        value.name = f"{name}/float"
        restored.name = name

    def _without_activation(self, value: ir.Value, zero_point: npt.NDArray[Any]) -> ir.Value:
        """What to quantize instead of a Relu's or Clip's output, when rounding to the range clips as it does."""
        node = value.producer()
        if not self.style.drop_activations or node is None or node.op_type not in ("Relu", "Clip") or zero_point != 0:
            return value
        if node.op_type == "Clip":
            low, high = (_scalar(operand) for operand in (*node.inputs[1:], None, None)[:2])
            top = self.plan.range_of(str(value.name)).high
            # The range is measured after the Clip, so it may pass the bound by a rounding error only.
            if low != 0.0 or (high is not None and top > high * (1 + 1e-6)):
                return value
        source = node.inputs[0]
        return source if source is not None and len(list(source.uses())) == 1 else value

    def _parameters(self, value: ir.Value) -> tuple[npt.NDArray[np.float32], npt.NDArray[Any]]:
        measured = self.plan.range_of(str(value.name))
        if self.style.integer_gates:
            measured = before_saturation(value, measured)
        if self.style.symmetric:
            return np.array(measured.symmetric(), np.float32), np.array(0, np.int8)
        scale, zero_point = measured.affine()
        return np.array(scale, np.float32), np.array(zero_point, np.uint8)

    def _dequantize(
        self, name: str, integers: npt.NDArray[Any], scales: npt.NDArray[Any], zeros: npt.NDArray[Any], *, axis: int
    ) -> ir.Value:
        parts = [
            self._constant(f"{name}/{part}", array)
            for part, array in (("integers", integers), ("scale", scales), ("zero_point", zeros))
        ]
        node = ir.node("DequantizeLinear", parts, {"axis": axis}, name=f"{name}/dequantize")
        node.outputs[0].name = f"{name}/restored"
        self.graph.append(node)
        return node.outputs[0]

    def _constant(self, name: str, array: npt.NDArray[Any]) -> ir.Value:
        return add_constant(self.graph, name, array)


def _rolled_pieces(value: ir.Value) -> list[ir.Node]:
    """The Slices of one tensor that Concats join to ``value``, as a roll does along each of its axes; else none."""
    joined = value.producer()
    if joined is not None and joined.op_type == "Reshape" and joined.inputs[0] is not None:
        whole = joined.inputs[0]
        joined = whole.producer() if len(list(whole.uses())) == 1 and not whole.is_graph_output() else None
    if joined is None or joined.op_type != "Concat":
        return []
    pieces = [part.producer() for part in joined.inputs if part is not None]
    cut = [piece for piece in pieces if piece is not None and piece.op_type == "Slice"]
    sources = {piece.inputs[0] for piece in cut}
    if len(cut) != len(pieces) or len(sources) != 1:
        return []
    (source,) = sources
    if source is None or set(source.consumers()) != set(cut):
        return cut
    return _rolled_pieces(source) or cut


def _scalar(value: ir.Value | None) -> float | None:
    if value is None:
        return None
    constant = value.const_value
    return None if constant is None else float(constant.numpy())
