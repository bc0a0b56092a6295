"""ExecuTorch: float programs."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from deploykit.arrays import FloatArray
from deploykit.calibration.dialect import Rendered
from deploykit.calibration.plan import QuantizationPlan
from deploykit.calibration.precision_plan import PrecisionPlan
from deploykit.calibration.quantize_activations import UINT8, IntegerType
from deploykit.graph import TorchProgram


@dataclass(frozen=True, kw_only=True)
class ExecuTorchDialect:
    """Writes plans into torch programs."""

    activations: IntegerType = UINT8
    dynamic_operators: frozenset[str] = frozenset()

    def keep_float(self, model: ir.Model, plan: QuantizationPlan) -> QuantizationPlan:
        """Keep nothing else in float."""
        return plan

    def render(self, graph: TorchProgram, plan: PrecisionPlan, probe: FloatArray) -> Rendered:
        """Return the master program."""
        return Rendered(graph=graph)


DIALECT = ExecuTorchDialect()
