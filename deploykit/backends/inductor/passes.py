"""Inductor on x86: the plan's Q/DQ around each convolution and linear of the torch program.

Inductor lowers ``dequantize -> conv2d/linear -> (relu) -> quantize`` with uint8 activations and
int8 per-channel weights to oneDNN's integer kernels when it freezes the weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import onnx_ir as ir
import torch
from torch import nn
from torch.fx import GraphModule, Node

from deploykit.arrays import FloatArray
from deploykit.backends.inductor.rounding import kernel_rounding
from deploykit.calibration.dialect import Rendered, keep_float
from deploykit.calibration.float_fallback import keep_pointlike
from deploykit.calibration.half import HalfPlan
from deploykit.calibration.kernel_rounding import KernelRounding
from deploykit.calibration.plan import QuantizationPlan
from deploykit.calibration.precision_plan import PrecisionPlan
from deploykit.calibration.quantize_activations import UINT8, IntegerType
from deploykit.calibration.torch_half import Cast, cast_to_half
from deploykit.calibration.torch_integers import (
    WEIGHTED,
    Activations,
    Integers,
    copy_of,
    planned_nodes,
    write_weight,
)
from deploykit.fusion.constants import add_call, operand
from deploykit.fusion.program import export_program
from deploykit.graph import TorchProgram


@dataclass(frozen=True, kw_only=True)
class InductorDialect:
    """Writes plans into torch programs."""

    activations: IntegerType = UINT8
    dynamic_operators: frozenset[str] = frozenset()
    integer_outputs: bool = False
    integer_biases: bool = False

    def keep_float(self, model: ir.Model, plan: QuantizationPlan) -> QuantizationPlan:
        """Take convolutions on 1x1 maps out of a plan: oneDNN gains nothing from their integers."""
        return keep_float(model, plan, (keep_pointlike(),))

    def kernel_rounding(self, model: ir.Model, plan: QuantizationPlan) -> KernelRounding:
        """Return how kernels depart from the roundings of a plan that `keep_float` gave."""
        return kernel_rounding(model, plan)

    def render(self, graph: TorchProgram, plan: PrecisionPlan, probe: FloatArray) -> Rendered:
        """Write a plan (None: FP32) into a copy of the master program."""
        return Rendered(graph=_render(graph, plan))


_CUTS = (torch.ops.aten.select.int, torch.ops.aten.slice.Tensor)

DIALECT = InductorDialect()


def _render(master: TorchProgram, plan: PrecisionPlan) -> TorchProgram:
    if plan is None:
        return master
    module = copy_of(master.program)
    if isinstance(plan, QuantizationPlan):
        _write_integers(module, plan)
        wrapped: nn.Module = module
    elif isinstance(plan, HalfPlan):
        wrapped = cast_to_half(module, plan.float_weights)
    else:
        wrapped = Cast(module.to(torch.bfloat16), torch.bfloat16)
    return replace(master, program=export_program(wrapped, master.input))


def _write_integers(module: GraphModule, plan: QuantizationPlan) -> None:
    activations = Activations(module, plan, Integers(dtype=torch.uint8))
    for planned in list(planned_nodes(module, plan)):
        if not planned.use.pointlike:
            activations.read(planned.node, operand(planned.node, 0), planned.use.input)
            write_weight(module, planned, plan)
    for node in _residual_adds(module, plan):
        # The convolution that is the other operand adds the integers as it writes.
        shortcut = operand(node, 0 if _is_fusible(operand(node, 1)) else 1)
        activations.read(node, shortcut, shortcut.name)
    _gather_rows(module)
    module.recompile()


def _gather_rows(module: GraphModule) -> None:
    """Copy the rows that a sum cuts out of a tensor, such as the class tokens of a batch.

    The sum that an integer linear computes as it writes takes its other summand for one block of memory, and so reads
    the wrong rows where a slice leaves some out.
    """
    for node in list(module.graph.nodes):
        if node.target != torch.ops.aten.add.Tensor:
            continue
        for summand in node.all_input_nodes:
            if summand.target in _CUTS and not _is_one_block(summand):
                copied = add_call(node, torch.ops.aten.clone.default, summand, memory_format=torch.contiguous_format)
                node.replace_input_with(summand, copied)


def _is_one_block(node: Node) -> bool:
    """Whether a tensor's values lie side by side; of a batch of any size nobody knows."""
    value = node.meta["val"]
    return all(isinstance(size, int) for size in value.shape) and bool(value.is_contiguous())


def _residual_adds(module: GraphModule, plan: QuantizationPlan) -> list[Node]:
    """Sums of two maps of which the plan has integers, one of them a convolution's, which fuses the sum.

    Tensors have the same names in the program and in the ONNX graph that the plan is of.
    """
    read = set(plan.placement.reads)
    return [
        node
        for node in module.graph.nodes
        if node.target == torch.ops.aten.add.Tensor
        and len(node.args) == 2
        and not node.kwargs
        and all(isinstance(summand, Node) and summand.name in read for summand in node.args)
        and any(_is_fusible(summand) for summand in node.all_input_nodes)
    ]


def _is_fusible(node: Node) -> bool:
    return node.target in WEIGHTED and len(node.users) == 1  # which is the sum
