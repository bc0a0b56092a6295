"""Inductor on x86: the plan's Q/DQ around each convolution and linear of the torch program.

Inductor lowers ``dequantize -> conv2d/linear -> (relu) -> quantize`` with uint8 activations and
int8 per-channel weights to oneDNN's integer kernels when it freezes the weights.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from functools import partial

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from deploykit.arrays import FloatArray
from deploykit.calibration.dialect import Rendered, keep_float
from deploykit.calibration.float_fallback import keep_pointlike
from deploykit.calibration.half import HalfPlan
from deploykit.calibration.plan import QuantizationPlan
from deploykit.calibration.precision_plan import PrecisionPlan
from deploykit.calibration.quantize_activations import UINT8, IntegerType
from deploykit.calibration.torch_integers import (
    WEIGHTED,
    Activations,
    Integers,
    copy_of,
    planned_nodes,
    value_of,
    weighted_nodes,
    write_weight,
)
from deploykit.fusion.constants import operand
from deploykit.fusion.program import export_program
from deploykit.graph import TRANSPOSED, TorchProgram


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

    def render(self, graph: TorchProgram, plan: PrecisionPlan, probe: FloatArray) -> Rendered:
        """Write a plan (None: FP32) into a copy of the master program."""
        return Rendered(graph=_render(graph, plan))


DIALECT = InductorDialect()


def _render(master: TorchProgram, plan: PrecisionPlan) -> TorchProgram:
    if plan is None:
        return master
    module = copy_of(master.program)
    if isinstance(plan, QuantizationPlan):
        _write_integers(module, plan)
        wrapped: nn.Module = module
    elif isinstance(plan, HalfPlan):
        _keep_in_float(module, plan, torch.float16)
        wrapped = _Cast(module, torch.float16)
    else:
        wrapped = _Cast(module.to(torch.bfloat16), torch.bfloat16)
    return replace(master, program=export_program(wrapped, master.input))


class _Cast(nn.Module):
    """A module of another dtype between float32 inputs and outputs."""

    def __init__(self, inner: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner = inner
        self.dtype = dtype

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return ``(N, C, H, W)`` float32 to the tuple of outputs in float32."""
        return tuple(output.float() for output in self.inner(images.to(self.dtype)))


def _keep_in_float(module: GraphModule, plan: HalfPlan, dtype: torch.dtype) -> None:
    """Convert a module but for the nodes of some weights, with casts around those."""
    kept_names = {name.removesuffix(TRANSPOSED) for name in plan.float_weights}
    kept = {node: node.args[1] for node in weighted_nodes(module) if str(operand(node, 1).target) in kept_names}
    floats = {
        str(argument.target): value_of(module, argument).clone()
        for node in kept
        for argument in node.args[1:3]
        if isinstance(argument, Node)
    }
    module.to(dtype)
    for target, value in floats.items():
        owner, _, name = target.rpartition(".")
        setattr(module.get_submodule(owner), name, nn.Parameter(value, requires_grad=False))
    for node in kept:
        with module.graph.inserting_before(node):
            source = module.graph.call_function(torch.ops.aten.to.dtype, (node.args[0], torch.float32))
        with module.graph.inserting_after(node):
            result = module.graph.call_function(torch.ops.aten.to.dtype, (node, dtype))
        node.replace_all_uses_with(result, delete_user_cb=partial(operator.is_not, result))
        node.update_arg(0, source)
    module.recompile()


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
    module.recompile()


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
