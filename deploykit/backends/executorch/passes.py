"""ExecuTorch: int8 convolutions between int8 maps; linears with int8 weights, which round each row of what they read.

The delegate computes in integers what stands between a DQ and a Q, so every map that a kernel of integers writes is
rounded. A linear reads float rows and rounds each by its own range, since a plan has no ranges for what linears write.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace

import torch
from torch.fx import GraphModule, Node

from deploykit.arrays import FloatArray
from deploykit.backends.executorch.concatenation import round_parts
from deploykit.backends.executorch.delegate_operators import rewrite_operators
from deploykit.backends.executorch.pooling import keep_pooled_sides
from deploykit.calibration.dialect import Rendered
from deploykit.calibration.integer_maps import IntegerMapsDialect, write_integer_maps
from deploykit.calibration.plan import QuantizationPlan
from deploykit.calibration.precision_plan import PrecisionPlan
from deploykit.calibration.torch_integers import CONVOLUTIONS, copy_of
from deploykit.fusion.constants import operand
from deploykit.fusion.program import export_program
from deploykit.graph import TorchProgram


@dataclass(frozen=True, kw_only=True)
class ExecuTorchDialect(IntegerMapsDialect):
    """Writes plans into torch programs."""

    def render(self, graph: TorchProgram, plan: PrecisionPlan, probe: FloatArray) -> Rendered:
        """Write a plan (None: FP32) into a copy of the master program, in operators that the delegate has."""
        module = copy_of(graph.program)
        if isinstance(plan, QuantizationPlan):
            names = tuple(output.name for output in graph.outputs)
            for planned in write_integer_maps(module, plan, names):
                if planned.node.target not in CONVOLUTIONS:
                    round_rows(module, planned.node)
            round_parts(module)
        keep_pooled_sides(module)
        rewrite_operators(module)
        module.recompile()
        return Rendered(graph=replace(graph, program=export_program(module, graph.input)))


DIALECT = ExecuTorchDialect()


def round_rows(module: GraphModule, linear: Node) -> None:
    """Let a linear round each row of what it reads to int8, by the row's own range, on every call."""
    operators = torch.ops.quantized_decomposed
    source = operand(linear, 0)
    with module.graph.inserting_before(linear):
        chosen = module.graph.call_function(operators.choose_qparams_per_token_asymmetric.default, (source, torch.int8))
        scale, zero_point = (module.graph.call_function(operator.getitem, (chosen, index)) for index in range(2))
        settings = (scale, zero_point, -128, 127, torch.int8)
        rounded = module.graph.call_function(operators.quantize_per_token.default, (source, *settings))
        restored = module.graph.call_function(
            operators.dequantize_per_token.default, (rounded, *settings, torch.float32)
        )
    linear.replace_input_with(source, restored)
