"""NNCF as a quantizer behind the plan: its ranges, integers and bias correction, for every dialect to render.

NNCF (the package nncf) quantizes the master graph with the calibration images: ranges by one of its estimators,
asymmetric activations with one scale a tensor, symmetric weights with one a channel, fast or full bias correction, and
accuracy control where mixed precision is asked for. Tensors that the plan rounds and NNCF does not keep the range of
least squared error. Its SmoothQuant comes before, where factors can still move into other layers:
`deploykit.calibration.nncf_smoothquant`.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from deploykit.calibration.images import CalibrationSet
from deploykit.calibration.imported_plan import plan_of
from deploykit.calibration.nncf_accuracy import CONTROL_IMAGES, RANKING_BATCHES, WorstOutput
from deploykit.calibration.nncf_package import PACKAGE, Batches, is_transformer, running
from deploykit.calibration.plan import QuantizationPlan
from deploykit.calibration.quantizer_nodes import as_int8, axis_of, parameters
from deploykit.calibration.statistics import Statistics
from deploykit.calibration.strip_quantizers import Stripped, TensorQuantizer, WeightQuantizer
from deploykit.errors import CalibrationError, CalibrationWarning, QuantizedModelError
from deploykit.onnx_values import array_of, floats_of
from deploykit.optional import require
from deploykit.spec import Int8

ESTIMATORS: dict[str, str] = {
    "nncf": "MEAN_MINMAX",
    "nncf-mse": "HISTOGRAM",
    "nncf-minmax": "MINMAX",
    "nncf-percentile": "MEAN_QUANTILE",
    "nncf-median": "MEDIAN_MINMAX",
    "nncf-no-outliers": "MEAN_NO_OUTLIERS_MINMAX",
}
"""What NNCF calls the range estimator of each calibrator, in `nncf.quantization.range_estimator`."""


def quantize_by_nncf(
    model: ir.Model, plan: QuantizationPlan, statistics: Statistics, images: CalibrationSet, settings: Int8
) -> QuantizationPlan:
    """Return a plan with NNCF's ranges, integers and bias shifts in place of its own.

    Args:
        model: the FP32 master graph.
        plan: what `calibrate` gave for it, without bias correction.
        statistics: what that saw.
        images: what to calibrate with; `MOST_IMAGES` of them, evenly spaced.
        settings: the range estimator, the bias correction, whether weights keep to 7 bits, and the budget where
            mixed precision is asked for.

    Raises:
        CalibrationError: NNCF fails on the graph, or leaves nothing in integers.
        MissingDependency: nncf is not installed.
    """
    quantized = ir.from_proto(run_nncf(model, images, settings))
    try:
        taken = plan_of(_quantizers(model, plan, quantized), plan.key).plan
    except QuantizedModelError as error:
        if not settings.mixed_precision:
            raise CalibrationError("NNCF leaves every layer in float. Fix: choose another recipe.") from error
        warnings.warn(
            f"NNCF's accuracy control meets {settings.min_sqnr_db:g} dB with no layer in integers, so the search "
            "begins with all of them. Fix: lower the budget, or choose another recipe.",
            CalibrationWarning,
            stacklevel=2,
        )
        return quantize_by_nncf(model, plan, statistics, images, replace(settings, mixed_precision=False))
    own = {name: why for name, why in taken.placement.float_nodes.items() if name in plan.placement.weights}
    plan = plan.without(model, dict.fromkeys(own, "NNCF leaves it in float")) if own else plan
    ranges = plan.ranges | {name: chosen for name, chosen in taken.ranges.items() if name in plan.ranges}
    seen = plan.statistics | {
        name: statistics.histograms[name].statistics(chosen)
        for name, chosen in ranges.items()
        if name in plan.statistics
    }
    return replace(
        plan, ranges=ranges, statistics=seen, weights=taken.weights, bias_shift=_bias_shifts(model, plan, quantized)
    )


def run_nncf(model: ir.Model, images: CalibrationSet, settings: Int8) -> Any:
    """Return NNCF's own Q/DQ graph of a master graph, an `onnx.ModelProto`.

    Raises:
        CalibrationError: NNCF fails on the graph.
        MissingDependency: nncf is not installed.
    """
    nncf = require("nncf", PACKAGE)
    advanced = require("nncf.quantization.advanced_parameters", PACKAGE)
    batches, source = Batches.of(images, model), str(model.graph.inputs[0].name)
    proto, data = copy.deepcopy(ir.to_proto(model)), nncf.Dataset(batches, lambda batch: {source: batch})
    options = {
        "preset": nncf.QuantizationPreset.MIXED,
        "subset_size": len(batches),
        "fast_bias_correction": settings.bias_correction != "full",
        "model_type": nncf.ModelType.TRANSFORMER if is_transformer(model) else None,
    }
    chosen = _advanced_parameters(advanced, settings)
    with running():
        if not settings.mixed_precision:
            return nncf.quantize(proto, data, advanced_parameters=chosen, **options)
        metric = WorstOutput.of(model, Batches.of(images, model, CONTROL_IMAGES))
        return nncf.quantize_with_accuracy_control(
            proto,
            data,
            nncf.Dataset(range(len(metric.batches)), lambda number: {source: metric.batches[number]}),
            metric,
            max_drop=metric.max_drop(settings.min_sqnr_db),
            advanced_quantization_parameters=chosen,
            advanced_accuracy_restorer_parameters=advanced.AdvancedAccuracyRestorerParameters(
                ranking_subset_size=RANKING_BATCHES, num_ranking_workers=1
            ),
            **options,
        )


def _advanced_parameters(advanced: Any, settings: Int8) -> Any:
    """Return settings as NNCF has them, without its SmoothQuant."""
    return advanced.AdvancedQuantizationParameters(
        overflow_fix=advanced.OverflowFix.ENABLE if settings.reduce_range else advanced.OverflowFix.DISABLE,
        disable_bias_correction=settings.bias_correction is None,
        activations_quantization_params=advanced.QuantizationParameters(per_channel=False),
        activations_range_estimator_params=_estimator(settings),
        smooth_quant_alphas=advanced.AdvancedSmoothQuantParameters(convolution=-1, matmul=-1),
    )


def _estimator(settings: Int8) -> Any:
    """Return NNCF's range estimator of a calibrator; quantiles leave out the share that ``percentile`` does."""
    known = require("nncf.quantization.range_estimator", PACKAGE).RangeEstimatorParametersSet
    chosen = copy.deepcopy(getattr(known, ESTIMATORS[str(settings.calibrator)]))
    if settings.calibrator == "nncf-percentile":
        chosen.min.quantile_outlier_prob = chosen.max.quantile_outlier_prob = 1 - settings.percentile / 100
    return chosen


def _quantizers(model: ir.Model, plan: QuantizationPlan, quantized: ir.Model) -> Stripped:
    """Return NNCF's quantizers as those of the master graph, whose names it keeps."""
    values = {str(value.name) for value in model.graph.inputs}
    values |= {str(value.name) for node in model.graph for value in node.outputs}
    found = Stripped(model=model)
    for node in quantized.graph:
        source = node.inputs[0] if node.op_type == "QuantizeLinear" else None
        if source is None or str(source.name) not in values:
            continue
        scale, zero_point = parameters(node)
        if scale.size == 1:
            own = TensorQuantizer(scale=float(scale[0]), zero_point=int(zero_point[0]))
            found.activations.setdefault(str(source.name), own)
    nodes = {node.name: node for node in quantized.graph}
    for name, use in plan.placement.weights.items():
        weight = _weight(nodes[name]) if name in nodes else None
        if weight is not None:
            found.weights[use.weight] = weight
    return found


def _weight(node: ir.Node) -> WeightQuantizer | None:
    """Return the integers that a node's weight is restored from; None: it is in float."""
    weight = node.inputs[1]
    restore = weight.producer() if weight is not None else None
    integers = restore.inputs[0] if restore is not None and restore.op_type == "DequantizeLinear" else None
    if restore is None or integers is None or not integers.is_initializer():
        return None
    scales, zero_points = parameters(restore)
    values = array_of(integers)
    int8, offsets = as_int8(values, zero_points)
    return WeightQuantizer(integers=int8, scales=scales, zero_points=offsets, axis=axis_of(restore, values.ndim))


def _bias_shifts(model: ir.Model, plan: QuantizationPlan, quantized: ir.Model) -> dict[str, npt.NDArray[np.float32]]:
    """Return what NNCF's bias correction added to each bias, ``(channels,)``, by node."""
    nodes = {node.name: node for node in quantized.graph}
    shifts = {}
    for name, use in plan.placement.weights.items():
        node = nodes.get(name)
        if node is None or use.bias is None or len(node.inputs) < 3 or node.inputs[2] is None:
            continue
        corrected = node.inputs[2]
        if corrected.is_initializer():
            shift = floats_of(corrected).reshape(-1) - floats_of(model.graph.initializers[use.bias]).reshape(-1)
            if np.any(shift):
                shifts[name] = np.asarray(shift, np.float32)
    return shifts
