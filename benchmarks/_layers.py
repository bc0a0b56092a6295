"""Multiply-adds and bytes of each layer of a graph, counted from its operators and shapes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx
from onnx import shape_inference
from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference

DENSE, POINTWISE, DEPTHWISE, GROUPED = "convolution", "pointwise", "depthwise", "grouped"
PRODUCT, ATTENTION = "product", "attention"
ELEMENTWISE, NORM, POOL, ROUNDING, MOVEMENT = "elementwise", "norm", "pooling", "rounding", "movement"
KINDS = (
    DENSE,
    POINTWISE,
    DEPTHWISE,
    GROUPED,
    PRODUCT,
    ATTENTION,
    ELEMENTWISE,
    NORM,
    POOL,
    ROUNDING,
    MOVEMENT,
)
"""Layer types, in the order of the tables; all before ``elementwise`` multiply."""

_CONVOLUTIONS = {"Conv": 1, "FusedConv": 1, "NhwcFusedConv": 1, "ConvInteger": 1, "QLinearConv": 3}
_PRODUCTS = {
    "MatMul": 1,
    "Gemm": 1,
    "FusedMatMul": 1,
    "FusedGemm": 1,
    "MatMulInteger": 1,
    "MatMulIntegerToFloat": 1,
    "DynamicQuantizeMatMul": 1,
    "QLinearMatMul": 3,
    "QGemm": 3,
}
"""Which input is the second factor; a convolution's weights."""
_FUSED_ATTENTION = frozenset({"Attention", "MultiHeadAttention", "ScaledDotProductAttention"})
_NORMS = frozenset(
    {
        "LayerNormalization",
        "SkipLayerNormalization",
        "BatchNormalization",
        "GroupNormalization",
        "InstanceNormalization",
        "Softmax",
        "QLinearSoftmax",
        "MVN",
        "SoftMax",
    }
)
_POOLS = ("Pool", "Reduce", "Mean")
_ROUNDINGS = frozenset(
    {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "FakeQuantize", "Cast", "Convert"}
)
_MOVEMENTS = frozenset(
    {
        "Transpose",
        "Reshape",
        "Concat",
        "Slice",
        "StridedSlice",
        "Split",
        "Gather",
        "Flatten",
        "Squeeze",
        "Unsqueeze",
        "Expand",
        "Pad",
        "Roll",
        "ReorderInput",
        "ReorderOutput",
        "Reorder",
        "Identity",
        "Upsample",
        "Resize",
        "Tile",
        "Input",
        "Output",
        "Concatenation",
        "Broadcast",
    }
)
_CONTRIB = "com.microsoft"
INTEGER_BYTES = 1
FLOAT_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class TensorType:
    """A tensor's shape, and the bytes of one element."""

    shape: tuple[int, ...]
    itemsize: int = FLOAT_BYTES

    @property
    def elements(self) -> int:
        """How many values it has."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """What it takes in memory."""
        return self.elements * self.itemsize


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One operator: its type, its multiply-adds, the bytes it reads and writes, whether it computes in integers."""

    name: str
    operator: str
    kind: str
    macs: int
    weight_bytes: int
    activation_bytes: int
    integer: bool = False

    @property
    def bytes(self) -> int:
        """Weights and activations, each read or written once."""
        return self.weight_bytes + self.activation_bytes


def convolution_kind(weights: Sequence[int], groups: int) -> str:
    """Return the type of a convolution with weights ``(O, I/groups, ...)``."""
    if groups > 1:
        return DEPTHWISE if weights[1] == 1 else GROUPED
    return POINTWISE if math.prod(weights[2:]) == 1 else DENSE


def convolution_macs(weights: Sequence[int], output: TensorType) -> int:
    """Return the multiply-adds of a convolution with weights ``(O, I/groups, ...)``, whatever the output's layout."""
    return output.elements * math.prod(weights[1:])


def product_macs(left: TensorType, output: TensorType) -> int:
    """Return the multiply-adds of a matrix product, batched or not, whatever is transposed."""
    return left.elements * output.shape[-1]


def attention_macs(query: TensorType, key: TensorType) -> int:
    """Return the multiply-adds of both products of an attention over ``(..., length, size)``."""
    return 2 * query.elements * key.shape[-2]


def other_kind(operator: str) -> str:
    """Return the type of an operator that multiplies no matrices."""
    name = operator.removeprefix("QLinear")
    if operator in _NORMS:
        return NORM
    if any(part in name for part in _POOLS):
        return POOL
    if operator in _ROUNDINGS:
        return ROUNDING
    return MOVEMENT if name in _MOVEMENTS else ELEMENTWISE


def layers_of(model: onnx.ModelProto, types: Mapping[str, TensorType] | None = None) -> list[Layer]:
    """Count every operator of a graph, constants left out.

    Args:
        model: with fixed shapes.
        types: of activations by name; None: as shape inference finds them.

    Raises:
        ValueError: a layer that multiplies has an operand of unknown shape.
    """
    weights = {
        each.name: TensorType(shape=tuple(each.dims), itemsize=_itemsize(each.data_type))
        for each in model.graph.initializer
    }
    if types is None:
        # ONNX's inference has no operator of ONNX Runtime's own, and ONNX Runtime's gives up at some integer kernels.
        own = any(node.domain == _CONTRIB for node in model.graph.node)
        types = _types_in(SymbolicShapeInference.infer_shapes(model, auto_merge=True)) if own else inferred_types(model)
    known = dict(types)
    return [_counted(node, weights, known) for node in model.graph.node if node.op_type != "Constant"]


def inferred_types(model: onnx.ModelProto) -> dict[str, TensorType]:
    """Return the type of every activation whose shape ONNX's inference finds whole."""
    return _types_in(shape_inference.infer_shapes(model, data_prop=True))


def _types_in(model: onnx.ModelProto) -> dict[str, TensorType]:
    graph = model.graph
    found = {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        tensor = value.type.tensor_type
        sides = [side.dim_value for side in tensor.shape.dim]
        if tensor.HasField("shape") and all(side > 0 for side in sides):
            found[value.name] = TensorType(shape=tuple(sides), itemsize=_itemsize(tensor.elem_type))
    return found


def _itemsize(data_type: int) -> int:
    return onnx.helper.tensor_dtype_to_np_dtype(data_type).itemsize


def _counted(node: onnx.NodeProto, weights: Mapping[str, TensorType], known: Mapping[str, TensorType]) -> Layer:
    operator = node.op_type
    every = {**known, **weights}
    output = known.get(node.output[0])
    kind, macs = other_kind(operator), 0
    if operator in _CONVOLUTIONS:
        weight = _type_of(node, _CONVOLUTIONS[operator], every)
        groups = next((each.i for each in node.attribute if each.name == "group"), 1)
        kind = convolution_kind(weight.shape, groups)
        macs = convolution_macs(weight.shape, _there(output, node))
    elif operator in _PRODUCTS:
        second = _PRODUCTS[operator]
        kind = PRODUCT if node.input[second] in weights else ATTENTION
        macs = _product(node, second, weights, every, _there(output, node))
    elif operator in _FUSED_ATTENTION:
        kind, macs = ATTENTION, _attention(node, every, _there(output, node))
    activations = [name for name in dict.fromkeys((*node.input, *node.output)) if name in known and name not in weights]
    first = known.get(node.input[0]) if node.input else None
    return Layer(
        name=node.name,
        operator=operator,
        kind=kind,
        macs=macs,
        weight_bytes=sum(weights[name].bytes for name in dict.fromkeys(node.input) if name in weights),
        activation_bytes=sum(known[name].bytes for name in activations),
        integer=_in_integers(operator, kind, first),
    )


def _product(
    node: onnx.NodeProto,
    second: int,
    weights: Mapping[str, TensorType],
    every: Mapping[str, TensorType],
    output: TensorType,
) -> int:
    right = every.get(node.input[second])
    if node.input[second] in weights and right is not None and len(right.shape) == 2:
        return output.elements * right.elements // output.shape[-1]
    return product_macs(_type_of(node, 0, every), output)


def _attention(node: onnx.NodeProto, every: Mapping[str, TensorType], output: TensorType) -> int:
    """Return the multiply-adds of fused attention; ONNX Runtime's own projects ``(N, length, size)`` itself."""
    first, second = _type_of(node, 0, every), _type_of(node, 1, every)
    if node.domain == _CONTRIB and node.op_type == "Attention":
        return product_macs(first, second) + 2 * output.elements * first.shape[1]
    return attention_macs(first, second)


def _in_integers(operator: str, kind: str, first: TensorType | None) -> bool:
    """Whether a layer computes in integers: by its operator, or by what it reads."""
    if kind == ROUNDING:
        return False
    named = operator.startswith(("QLinear", "QGemm", "DynamicQuantize")) or "Integer" in operator
    return named or (first is not None and first.itemsize == INTEGER_BYTES)


def _type_of(node: onnx.NodeProto, place: int, every: Mapping[str, TensorType]) -> TensorType:
    return _there(every.get(node.input[place]), node)


def _there(found: TensorType | None, node: onnx.NodeProto) -> TensorType:
    if found is None:
        raise ValueError(f"the shapes of {node.op_type} {node.name!r} are unknown. Give the graph fixed input shapes.")
    return found


def macs_by_kind(layers: Iterable[Layer]) -> dict[str, int]:
    """Return the multiply-adds of each layer type that has some, in the order of `KINDS`."""
    totals = dict.fromkeys(KINDS, 0)
    for layer in layers:
        totals[layer.kind] += layer.macs
    return {kind: total for kind, total in totals.items() if total}
