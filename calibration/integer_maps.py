"""A plan in a torch program whose runtime reads and writes whole maps of int8.

Every tensor that a kernel of integers writes is rounded, whoever reads it, with a DQ for each reader. Linears get the
plan's integers for their weights; how they round what they read is the runtime's own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch.fx import GraphModule, Node

from deploykit.calibration.dialect import keep_float
from deploykit.calibration.float_fallback import keep_image_side
from deploykit.calibration.kernel_rounding import KernelRounding, as_planned
from deploykit.calibration.plan import QuantizationPlan
from deploykit.calibration.quantize_activations import UINT8, IntegerType
from deploykit.calibration.torch_integers import (
    CONVOLUTIONS,
    Activations,
    Integers,
    PlannedNode,
    planned_nodes,
    write_weight,
)
from deploykit.fusion.constants import operand
from deploykit.fusion.respell import respell

RESTORE = torch.ops.quantized_decomposed.dequantize_per_tensor.default


@dataclass(frozen=True, kw_only=True)
class IntegerMapsDialect:
    """What the dialects of such runtimes have in common; each adds how it renders."""

    activations: IntegerType = UINT8
    dynamic_operators: frozenset[str] = frozenset({"Gemm", "MatMul"})
    integer_outputs: bool = True
    integer_biases: bool = False

    def keep_float(self, model: ir.Model, plan: QuantizationPlan) -> QuantizationPlan:
        """Take the convolutions of the image out of a plan: they read a map of three channels."""
        return keep_float(model, plan, (keep_image_side,))

    def kernel_rounding(self, model: ir.Model, plan: QuantizationPlan) -> KernelRounding:
        """Return that kernels round as planned."""
        return as_planned(model, plan)


def write_integer_maps(
    module: GraphModule, plan: QuantizationPlan, outputs: tuple[str, ...], *, linears: bool = False
) -> list[PlannedNode]:
    """Write a plan into a module, in place; return the nodes whose weights are integers now.

    Args:
        module: of a master program.
        plan: the part of the plan that the runtime has in integers.
        outputs: the names of what the module returns, in order.
        linears: round what linears read too, in the plan's ranges.
    """
    activations = Activations(module, plan, Integers(dtype=torch.int8))
    sources = _tensors_of(module, outputs)
    planned = list(planned_nodes(module, plan))
    convolutions = {each.node for each in planned if each.node.target in CONVOLUTIONS}
    for each in planned:
        write_weight(module, each, plan)
    for node, readers in _quantized(sources, plan, convolutions):
        for reader in readers:
            activations.read(reader, node, sources[node])
    for each, tensor in _float_inputs(plan, planned):
        if linears or each.node in convolutions:
            activations.read(each.node, operand(each.node, 0), tensor)
    module.recompile()
    return planned


def _float_inputs(plan: QuantizationPlan, planned: list[PlannedNode]) -> Iterator[tuple[PlannedNode, str]]:
    """Yield the layers that read floats, each with the tensor that it reads in the plan.

    Layers that share a weight stand in the order of the plan's uses of it; where the plan has some of these in float it
    does not say of which it has the range, and none is rounded.
    """
    nodes: dict[str, list[PlannedNode]] = defaultdict(list)
    tensors: dict[str, list[str]] = defaultdict(list)
    for each in planned:
        nodes[each.use.weight].append(each)
    for use in plan.placement.weights.values():
        tensors[use.weight].append(use.input)
    for weight, sharing in nodes.items():
        if len(sharing) != len(tensors[weight]):
            continue
        for each, tensor in zip(sharing, tensors[weight], strict=True):
            if operand(each.node, 0).target != RESTORE:
                yield each, tensor


def _tensors_of(module: GraphModule, outputs: tuple[str, ...]) -> dict[Node, str]:
    """Map each node to the plan's name of what it gives: that of the ONNX graph, where reshapes are views."""
    _, names = respell(module.graph)
    tensors = {node: str(node.target) if node.op == "placeholder" else names[node.name] for node in module.graph.nodes}
    (given,) = module.graph.output_node().args
    return tensors | dict(zip(given, outputs, strict=True))  # type: ignore[arg-type]  # a tuple of nodes


def _quantized(
    sources: dict[Node, str], plan: QuantizationPlan, convolutions: set[Node]
) -> Iterator[tuple[Node, list[Node]]]:
    """Yield every node whose output becomes integers, and who reads it through them."""
    everyone = {*plan.placement.writes, *plan.placement.between}
    known = {*plan.placement.tensors, *plan.placement.same_range}
    for node, tensor in sources.items():
        if tensor not in known:
            continue
        readers = [user for user in node.users if tensor in everyone or user in convolutions]
        if readers:
            yield node, readers
