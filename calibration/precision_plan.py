"""The plan of each precision: what a dialect renders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from deploykit.calibration.half import HalfPlan
from deploykit.calibration.plan import QuantizationPlan


@dataclass(frozen=True, kw_only=True)
class Bf16Plan:
    """Everything in bfloat16: its range is float32's, so nothing overflows."""


PrecisionPlan: TypeAlias = QuantizationPlan | HalfPlan | Bf16Plan | None
"""What a dialect renders; None is FP32."""
