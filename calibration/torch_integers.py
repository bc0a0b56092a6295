"""The weights of a torch program and the plan's integers for them: what every dialect that writes programs shares."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from deploykit.calibration.placement import IntegerWeight
from deploykit.calibration.plan import QuantizationPlan
from deploykit.calibration.ranges import ActivationRange
from deploykit.fusion.constants import operand
from deploykit.graph import TRANSPOSED

CONVOLUTIONS = (torch.ops.aten.conv2d.default, torch.ops.aten.conv2d.padding)
WEIGHTED = (*CONVOLUTIONS, torch.ops.aten.linear.default)
_OPERATORS = torch.ops.quantized_decomposed


@dataclass(frozen=True, kw_only=True)
class PlannedNode:
    """A node of a program that a plan has in integers: its name and its use in the plan's ONNX graph."""

    node: Node
    name: str
    use: IntegerWeight

    @property
    def transposed(self) -> bool:
        """Whether the ONNX graph holds the weight transposed, as a MatMul does."""
        return self.node.target not in CONVOLUTIONS and self.use.axis == 1


@dataclass(frozen=True, kw_only=True)
class Integers:
    """Affine integers: 0 to 255 in uint8, or the same less 128 in int8."""

    dtype: torch.dtype

    def settings(self, measured: ActivationRange) -> tuple[float, int, int, int, torch.dtype]:
        """Return scale, zero point, least and largest integer and dtype, as Q/DQ operators take them."""
        scale, zero_point = measured.affine()
        shift = 0 if self.dtype == torch.uint8 else 128
        return scale, zero_point - shift, -shift, 255 - shift, self.dtype


class Activations:
    """Q/DQ pairs behind the tensors of one program, in the ranges of a plan: one Q a tensor, one DQ a reader."""

    def __init__(self, module: GraphModule, plan: QuantizationPlan, kind: Integers) -> None:
        self._graph = module.graph
        self._plan = plan
        self._kind = kind
        self._integers: dict[tuple[Node, str], Node] = {}

    def read(self, node: Node, source: Node, tensor: str) -> None:
        """Let a node read a value through Q/DQ, in the range of a tensor of the plan."""
        settings = self._kind.settings(self._plan.range_of(tensor))
        if (source, tensor) not in self._integers:
            with self._graph.inserting_after(source):
                quantized = self._graph.call_function(_OPERATORS.quantize_per_tensor.default, (source, *settings))
            self._integers[source, tensor] = quantized
        with self._graph.inserting_before(node):
            parts = (self._integers[source, tensor], *settings)
            restored = self._graph.call_function(_OPERATORS.dequantize_per_tensor.default, parts)
        node.replace_input_with(source, restored)


def copy_of(program: torch.export.ExportedProgram) -> GraphModule:
    """Return the program's module with weights of its own: `module()` shares the program's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, where it copies a graph module
        return copy.deepcopy(program.module())


def weighted_nodes(module: GraphModule) -> list[Node]:
    """Return the convolutions and linears of constant weights."""
    return [
        node
        for node in module.graph.nodes
        if node.target in WEIGHTED and isinstance(node.args[1], Node) and node.args[1].op == "get_attr"
    ]


def planned_nodes(module: GraphModule, plan: QuantizationPlan) -> Iterator[PlannedNode]:
    """Yield the weighted nodes that a plan has in integers; of nodes that share a weight the plan's first counts."""
    placed = reversed(plan.placement.weights.items())
    by_weight = {use.weight.removesuffix(TRANSPOSED): (name, use) for name, use in placed}
    for node in weighted_nodes(module):
        found = by_weight.get(str(operand(node, 1).target))
        if found is not None:
            yield PlannedNode(node=node, name=found[0], use=found[1])


def write_weight(module: GraphModule, planned: PlannedNode, plan: QuantizationPlan) -> None:
    """Write a node's weight as the plan's integers behind a DQ of its own, and the plan's correction into its bias.

    The constants are named by the node: two nodes that share a weight would share its DQ, which no runtime fuses.
    """
    node, transposed = planned.node, planned.transposed
    values = value_of(module, operand(node, 1)).numpy()
    integers, scales = plan.integers_of(planned.name, values.T if transposed else values, int(transposed))
    if transposed:
        integers = np.ascontiguousarray(integers.T)
    _shift_bias(module, planned, plan)
    parts = [
        add_constant(module, node, part, torch.from_numpy(array))
        for part, array in (("integers", integers), ("scales", scales), ("zeros", np.zeros(len(scales), np.int64)))
    ]
    with module.graph.inserting_before(node):
        restored = module.graph.call_function(
            _OPERATORS.dequantize_per_channel.default, (*parts, 0, -127, 127, torch.int8)
        )
    node.update_arg(1, restored)


def _shift_bias(module: GraphModule, planned: PlannedNode, plan: QuantizationPlan) -> None:
    """Add the plan's correction to a node's bias."""
    shift = plan.bias_shift.get(planned.name)
    if shift is None or not np.any(shift):
        return
    node = planned.node
    bias = node.args[2] if len(node.args) > 2 else None
    correction = torch.from_numpy(np.asarray(shift, np.float32))
    shifted = value_of(module, bias) + correction if isinstance(bias, Node) else correction
    constant = add_constant(module, node, "shifted_bias", shifted)
    node.args = (node.args[0], node.args[1], constant, *node.args[3:])


def add_constant(module: GraphModule, node: Node, part: str, value: Tensor) -> Node:
    """Register a constant for one node, beside its weight, and return what reads it, in front of the node."""
    owner = str(operand(node, 1).target).rpartition(".")[0] if operand(node, 1).op == "get_attr" else ""
    name = f"{node.name}_{part}"
    module.get_submodule(owner).register_buffer(name, value)
    with module.graph.inserting_before(node):
        return module.graph.get_attr(f"{owner}.{name}" if owner else name)


def value_of(module: nn.Module, node: Node) -> Tensor:
    """Return the constant that a node reads."""
    owner, _, name = str(node.target).rpartition(".")
    value: Tensor = getattr(module.get_submodule(owner), name)
    return value.detach()
