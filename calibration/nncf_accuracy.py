"""NNCF's accuracy control: the layers that cost the most are put back into float until the budget is met."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from deploykit.arrays import FloatArray
from deploykit.calibration.nncf_package import Batches
from deploykit.onnx_session import onnx_session
from deploykit.parity.metrics import sqnr_db

CONTROL_IMAGES = 16
"""How many images the budget is measured on: as many as an export compares its numbers on."""
RANKING_BATCHES = 4
"""How many batches each layer is ranked on, of those that lose the most."""
FLOAT_DB = 100.0
"""What the FP32 graph counts as."""


@dataclass(frozen=True, kw_only=True, eq=False)
class WorstOutput:
    """The metric of NNCF's accuracy control: SQNR in dB against FP32 of the output that suffers most.

    NNCF's items are the numbers of ``batches``; ``expected`` has what FP32 gives for each of them.
    """

    source: str
    batches: tuple[FloatArray, ...]
    expected: tuple[dict[str, FloatArray], ...]

    @classmethod
    def of(cls, model: ir.Model, batches: Batches) -> WorstOutput:
        """Run the FP32 master graph on the images."""
        source, all_batches = str(model.graph.inputs[0].name), tuple(batches)
        return cls(source=source, batches=all_batches, expected=tuple(_run(model, source, all_batches)))

    def __call__(self, proto: Any, numbers: Iterable[int]) -> tuple[float, list[float]]:
        """Return the metric of an `onnx.ModelProto` over some batches, and that of each."""
        chosen = list(numbers)
        found = _run(ir.from_proto(proto), self.source, [self.batches[number] for number in chosen])
        expected = [self.expected[number] for number in chosen]
        each = [_worst([one], [other]) for one, other in zip(expected, found, strict=True)]
        return _worst(expected, found), each

    @staticmethod
    def max_drop(min_sqnr_db: float) -> float:
        """Return how far below FP32 a budget is, in dB."""
        return FLOAT_DB - min_sqnr_db


def _run(model: ir.Model, source: str, batches: Sequence[FloatArray]) -> list[dict[str, FloatArray]]:
    session, names = onnx_session(model, optimize=False), [str(value.name) for value in model.graph.outputs]
    runs = ([np.asarray(output, np.float32) for output in session.run(names, {source: batch})] for batch in batches)
    return [dict(zip(names, outputs, strict=True)) for outputs in runs]


def _worst(expected: list[dict[str, FloatArray]], found: list[dict[str, FloatArray]]) -> float:
    def joined(outputs: list[dict[str, FloatArray]], name: str) -> FloatArray:
        return np.concatenate([each[name] for each in outputs])

    return min(FLOAT_DB, *(sqnr_db(joined(expected, name), joined(found, name)) for name in expected[0]))
