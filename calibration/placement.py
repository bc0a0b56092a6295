"""Which tensors of a master graph run in integers: found from the graph alone, before any image is seen.

Convolutions and matrix products with constant weights run in integers, and so do the residual
adds and max-poolings between them, since a float island there costs two conversions of a whole
map. Everything else stays in float, with a reason. A dialect may leave more in float, where its
runtime is faster so.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace

import onnx_ir as ir

from deploykit.errors import CalibrationError


@dataclass(frozen=True, kw_only=True)
class IntegerWeight:
    """What a node that runs in integers reads and writes; ``axis`` is that of its weight's output channels.

    ``pointlike`` tells a convolution on a 1x1 map: squeeze-and-excitation, or a head behind the pooling.
    """

    weight: str
    axis: int
    input: str
    output: str
    bias: str | None
    pointlike: bool = False


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Nodes and tensors by name.

    ``weights`` maps each node that runs in integers to its constant weight. ``reads`` are read by
    integer kernels. ``writes`` are written by them (after the Relu or Clip that the kernel fuses).
    ``between`` are what stands between them, gated maps (hard-swish, SiLU, squeeze-and-excitation), global
    average pools and residual adds of these, which some runtimes compute in integers and others fuse in float.
    ``same_range`` maps the output of a max-pooling, or of several in a row, to what the first one reads, whose range it
    shares.
    ``float_nodes`` maps each weighted node that stays in float to the reason.
    """

    weights: dict[str, IntegerWeight] = field(default_factory=dict)
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    between: tuple[str, ...] = ()
    same_range: dict[str, str] = field(default_factory=dict)
    float_nodes: dict[str, str] = field(default_factory=dict)

    @property
    def tensors(self) -> tuple[str, ...]:
        """Every tensor that needs a range of its own."""
        return tuple(
            name for name in dict.fromkeys((*self.reads, *self.writes, *self.between)) if name not in self.same_range
        )

    def limited_to(self, tensors: Container[str]) -> Placement:
        """Return the placement without the tensors that are not among these; a plan of another tool lacks some."""

        def known(name: str) -> bool:
            return self.same_range.get(name, name) in tensors

        return replace(
            self,
            reads=tuple(filter(known, self.reads)),
            writes=tuple(filter(known, self.writes)),
            between=tuple(filter(known, self.between)),
            same_range={pooled: source for pooled, source in self.same_range.items() if source in tensors},
        )


def place(model: ir.Model, keep_float: Mapping[str, str] | None = None) -> Placement:
    """Find the integer part of a master graph; ``keep_float`` maps nodes that are to stay in float to the reason."""
    kept = keep_float or {}
    weights: dict[str, IntegerWeight] = {}
    reads: dict[str, None] = {}
    writes: dict[str, None] = {}
    between: dict[str, None] = {}
    same_range: dict[str, str] = {}
    float_nodes: dict[str, str] = {}
    computed_once = constant_values(model.graph)
    for node in model.graph:
        if node.op_type in ("Conv", "Gemm", "MatMul") and _constant(node.inputs[1]):
            reason = kept.get(_name(node)) or _why_float(node, computed_once)
            if reason:
                float_nodes[_name(node)] = reason
                continue
            weights[_name(node)] = _weight(node)
            reads[_text(node.inputs[0])] = None
            if node.op_type == "Conv":
                writes[_text(_after_activation(node.outputs[0]))] = None
        elif node.op_type == "Add" and all(_text(value) in writes for value in node.inputs):
            reads.update(dict.fromkeys(_text(value) for value in node.inputs))
            writes[_text(_after_activation(node.outputs[0]))] = None
        elif node.op_type == "Add" and all(_text(value) in writes or _text(value) in between for value in node.inputs):
            between[_text(_after_activation(node.outputs[0]))] = None
        elif node.op_type == "MaxPool" and _text(node.inputs[0]) in writes:
            source, pooled = _text(node.inputs[0]), _text(node.outputs[0])
            reads[source] = None
            writes[pooled] = None
            same_range[pooled] = same_range.get(source, source)
        elif (is_pooled(node) or is_gated(node)) and any(
            _text(value) in writes or _text(value) in between for value in node.inputs
        ):
            between[_text(node.outputs[0])] = None
    return Placement(
        weights=weights,
        reads=tuple(reads),
        writes=tuple(writes),
        between=tuple(between),
        same_range=same_range,
        float_nodes=float_nodes,
    )


def without(model: ir.Model, placement: Placement, nodes: Mapping[str, str]) -> Placement:
    """Return a placement with some of its nodes in float, and all that was in integers only because of them.

    Args:
        model: the master graph that the placement is of.
        placement: what runs in integers so far.
        nodes: the nodes to take out, each with the reason.

    Raises:
        CalibrationError: a node does not run in integers.
    """
    unknown = sorted(nodes.keys() - placement.weights.keys())
    if unknown:
        raise CalibrationError(
            f"{', '.join(unknown)}: no node of these names runs in integers. The plan names those that do."
        )
    return place(model, placement.float_nodes | dict(nodes))


def fused_activation(value: ir.Value) -> ir.Node | None:
    """Return the Relu or Clip that alone reads a value, which integer kernels fuse; None where there is none."""
    consumers = list(value.consumers())
    if len(consumers) != 1 or value.is_graph_output():
        return None
    node = consumers[0]
    return node if node.op_type in ("Relu", "Clip") else None


def is_pooled(node: ir.Node) -> bool:
    """Return whether a node is a global average pool: the mean of each channel of a map, as a 1x1 map."""
    if node.op_type == "GlobalAveragePool":
        return True
    if node.op_type != "ReduceMean" or len(node.inputs) != 2 or not node.attributes.get_int("keepdims", 1):
        return False
    source, axes = node.inputs
    if source is None or source.shape is None or len(source.shape) != 4 or axes is None or axes.const_value is None:
        return False
    return sorted(int(axis) % 4 for axis in axes.const_value.numpy()) == [2, 3]


def is_gated(node: ir.Node) -> bool:
    """Return whether a node is a hard-swish, or a product with a sigmoid: SiLU or squeeze-and-excitation."""
    if node.op_type == "HardSwish":
        return True
    return node.op_type == "Mul" and any(is_gate(value) for value in node.inputs)


def is_gate(value: ir.Value | None) -> bool:
    """Return whether a value lies between 0 and 1 by the node that gives it."""
    producer = value.producer() if value is not None else None
    return producer is not None and producer.op_type in ("Sigmoid", "HardSigmoid")


def _after_activation(value: ir.Value) -> ir.Value:
    node = fused_activation(value)
    return node.outputs[0] if node is not None else value


def _weight(node: ir.Node) -> IntegerWeight:
    transposed = node.op_type == "Gemm" and bool(node.attributes.get_int("transB", 0))
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if node.op_type == "MatMul":
        bias = _added_bias(node.outputs[0])
    shape = node.outputs[0].shape
    return IntegerWeight(
        weight=_text(node.inputs[1]),
        axis=0 if node.op_type == "Conv" or transposed else 1,
        input=_text(node.inputs[0]),
        output=_text(node.outputs[0]),
        bias=bias.name if bias is not None else None,
        pointlike=node.op_type == "Conv" and shape is not None and list(shape[2:]) == [1, 1],
    )


def _added_bias(value: ir.Value) -> ir.Value | None:
    """Return the constant vector that an Add after a MatMul adds, when nothing else reads the product."""
    consumers = list(value.consumers())
    if len(consumers) != 1 or consumers[0].op_type != "Add":
        return None
    for operand in consumers[0].inputs:
        if operand is not None and _constant(operand) and operand.shape is not None and len(operand.shape) == 1:
            return operand
    return None


def _why_float(node: ir.Node, constants: frozenset[ir.Value]) -> str | None:
    weight, bias = node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None
    rank = len(weight.shape or ()) if weight is not None else 0
    if node.inputs[0] in constants:
        return "it reads constants alone, and is computed once"
    if node.op_type == "MatMul" and rank != 2:
        return f"its weight has rank {rank}, and integer kernels take matrices"
    if node.op_type == "Gemm" and node.attributes.get_int("transA"):
        return "it reads its input transposed, and integer kernels take rows"
    if bias is not None and not _constant(bias):
        return "its bias is computed, and integer kernels take constants"
    return None


def constant_values(graph: ir.Graph) -> frozenset[ir.Value]:
    """Return every value that is the same for all images: initializers, and what is computed from nothing else."""
    found = set(graph.initializers.values())
    for node in graph:
        inputs = [value for value in node.inputs if value is not None]
        if node.op_type == "Constant" or (inputs and all(value in found for value in inputs)):
            found.update(node.outputs)
    return frozenset(found)


def _constant(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer()


def _text(value: ir.Value | None) -> str:
    return (value.name or "") if value is not None else ""


def _name(node: ir.Node) -> str:
    return node.name or node.op_type
