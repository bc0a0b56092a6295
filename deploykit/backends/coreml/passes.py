"""Core ML: int8 convolutions and linears between int8 tensors, each read in its plan's range.

Core ML fuses ``dequantize -> conv or linear -> (activation) -> quantize`` with int8 weights, where the processor has a
unit for that, so every tensor that an integer kernel writes is rounded, whoever reads it. It has no ranges that are
chosen on each call, so linears read in fixed ranges too. Float16 is written by its converter.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import onnx_ir as ir

from deploykit.arrays import FloatArray
from deploykit.calibration.dialect import Rendered
from deploykit.calibration.half import HalfPlan
from deploykit.calibration.integer_maps import IntegerMapsDialect, write_integer_maps
from deploykit.calibration.plan import QuantizationPlan
from deploykit.calibration.precision_plan import PrecisionPlan
from deploykit.calibration.torch_integers import copy_of
from deploykit.fusion.program import export_program
from deploykit.graph import TorchProgram


@dataclass(frozen=True, kw_only=True)
class CoreMLDialect(IntegerMapsDialect):
    """Writes plans into torch programs."""

    dynamic_operators: frozenset[str] = frozenset()

    def keep_float(self, model: ir.Model, plan: QuantizationPlan) -> QuantizationPlan:
        """Return the whole plan: what stays in float leaves the unit for integers."""
        return plan

    def render(self, graph: TorchProgram, plan: PrecisionPlan, probe: FloatArray) -> Rendered:
        """Write a plan (None: FP32) into a copy of the master program."""
        if isinstance(plan, HalfPlan):
            return Rendered(graph=replace(graph, half_except=tuple(plan.float_weights)))
        if not isinstance(plan, QuantizationPlan):
            return Rendered(graph=graph)
        module = copy_of(graph.program)
        write_integer_maps(module, plan, tuple(output.name for output in graph.outputs), linears=True)
        program = export_program(module, graph.input)
        return Rendered(graph=replace(graph, program=program, half_except=() if plan.float_dtype == "fp16" else None))


DIALECT = CoreMLDialect()
