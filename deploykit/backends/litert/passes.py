"""LiteRT: int8 convolutions between int8 maps; linears with int8 weights, which round each row of what they read.

A convolution runs in integers where what it reads and what it writes are int8, so every tensor that a kernel of
integers writes is quantized, whoever reads it, with a DQ for each reader. A linear has integers in its weights alone:
LiteRT rounds each token by its own range, which is more accurate than one range for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import onnx_ir as ir
import torch
from torch.fx import GraphModule

from deploykit.arrays import FloatArray
from deploykit.backends.litert.gained_norms import keep_gains
from deploykit.backends.litert.integer_norms import write_integer_norms
from deploykit.backends.litert.split_kernels import keep_large_kernels, split_kernels
from deploykit.backends.litert.unrounded_readers import keep_unrounded
from deploykit.calibration.dialect import Rendered, keep_float
from deploykit.calibration.float_fallback import keep_image_side
from deploykit.calibration.half import HalfPlan
from deploykit.calibration.integer_maps import IntegerMapsDialect, write_integer_maps
from deploykit.calibration.plan import QuantizationPlan
from deploykit.calibration.precision_plan import PrecisionPlan
from deploykit.calibration.torch_gates import write_integer_gates
from deploykit.calibration.torch_integers import copy_of, value_of, weighted_nodes
from deploykit.fusion.constants import operand
from deploykit.fusion.program import export_program
from deploykit.graph import TRANSPOSED, TorchProgram


@dataclass(frozen=True, kw_only=True)
class LiteRTDialect(IntegerMapsDialect):
    """Writes plans into torch programs."""

    def keep_float(self, model: ir.Model, plan: QuantizationPlan) -> QuantizationPlan:
        """Take the convolutions of the image out of a plan, and those whose kernels are split."""
        return keep_float(model, plan, (keep_image_side, keep_large_kernels))

    def render(self, graph: TorchProgram, plan: PrecisionPlan, probe: FloatArray) -> Rendered:
        """Write a plan (None: FP32) into a copy of the master program."""
        module = copy_of(graph.program)
        if isinstance(plan, QuantizationPlan):
            _write_integers(module, plan, tuple(output.name for output in graph.outputs))
        elif isinstance(plan, HalfPlan):
            _round_weights(module, plan)
        if not split_kernels(module) and plan is None:
            return Rendered(graph=graph)
        module.recompile()
        return Rendered(graph=replace(graph, program=export_program(module, graph.input)))


DIALECT = LiteRTDialect()


def _write_integers(module: GraphModule, plan: QuantizationPlan, outputs: tuple[str, ...]) -> None:
    write_integer_maps(module, plan, outputs)
    write_integer_gates(module)
    write_integer_norms(module)
    keep_unrounded(module)
    keep_gains(module)


def _round_weights(module: GraphModule, plan: HalfPlan) -> None:
    """Round weights to what float16 holds, in place, but for those that a plan keeps; the engine stores them so."""
    kept = {name.removesuffix(TRANSPOSED) for name in plan.float_weights}
    most = torch.finfo(torch.float16).max
    for node in weighted_nodes(module):
        weight = operand(node, 1)
        if str(weight.target) not in kept:
            value = value_of(module, weight)
            value.copy_(value.clamp(-most, most).half().float())
