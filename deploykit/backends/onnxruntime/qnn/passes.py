"""Qualcomm's NPU: uint8 maps between integer convolutions, uint16 about linears, FP16 for all the rest.

The NPU has no FP32: what a plan leaves in float is FP16, by casts.
"""

from __future__ import annotations

from dataclasses import dataclass

from deploykit.arrays import FloatArray
from deploykit.backends.onnxruntime.qnn.crop_first import crop_first
from deploykit.backends.onnxruntime.qnn.wide_linears import widen_linears
from deploykit.calibration.dialect import OnnxDialect, Rendered
from deploykit.calibration.drop_activations import drop_activations
from deploykit.calibration.half import HalfPlan
from deploykit.calibration.precision_plan import PrecisionPlan
from deploykit.calibration.quantize_activations import UINT8, quantize_activations
from deploykit.calibration.quantize_weights import quantize_weights
from deploykit.calibration.tidy_graph import tidy_graph
from deploykit.fusion.onnx_fold_dimensions import fold_onnx_dimensions
from deploykit.fusion.onnx_passes import OnnxPass
from deploykit.fusion.pipeline import EXACT_DB
from deploykit.graph import OnnxGraph


@dataclass(frozen=True, kw_only=True)
class QnnDialect(OnnxDialect):
    """The dialect of ONNX graphs for the NPU."""

    def render(self, graph: OnnxGraph, plan: PrecisionPlan, probe: FloatArray) -> Rendered:
        """Write a plan into a copy of a master graph; of FP16 no weight stays in FP32, which the NPU does not have."""
        return super().render(graph, HalfPlan(float_weights={}) if isinstance(plan, HalfPlan) else plan, probe)


DIALECT = QnnDialect(
    activations=UINT8,
    integer_outputs=True,
    integer_biases=True,
    legalize=(
        # The NPU has tensors of at most five dimensions.
        OnnxPass(name="qnn-dimensions", rewrite=fold_onnx_dimensions, min_sqnr_db=EXACT_DB),
        OnnxPass(name="qnn-crops", rewrite=crop_first, min_sqnr_db=EXACT_DB),
    ),
    int8=(
        quantize_weights(integer_bias=True),
        # Before the activations: what reads a linear's input in uint16 needs it in float, and not in uint8.
        widen_linears,
        quantize_activations(UINT8, writes=True, between=True),
        drop_activations(between=True),
        tidy_graph,
    ),
)
