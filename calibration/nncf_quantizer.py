"""NNCF as a quantizer behind the plan: its ranges, integers and bias correction, for every dialect to render.

NNCF (the package nncf) quantizes the master graph with the calibration images: minimum and maximum averaged over the
images, asymmetric activations with one scale a tensor, symmetric weights with one a channel, and fast or full bias
correction. Tensors that the plan rounds and NNCF does not keep the range of least squared error.
Its SmoothQuant would leave a Mul before each product, which no kernel fuses: the plan's own equalization does the same
before NNCF sees the graph.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import math
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from deploykit.arrays import FloatArray
from deploykit.calibration.images import CalibrationSet
from deploykit.calibration.imported_plan import plan_of
from deploykit.calibration.plan import QuantizationPlan
from deploykit.calibration.quantizer_nodes import as_int8, axis_of, parameters
from deploykit.calibration.statistics import Statistics
from deploykit.calibration.strip_quantizers import Stripped, TensorQuantizer, WeightQuantizer
from deploykit.errors import CalibrationError, plain_reason
from deploykit.onnx_session import graph_batch
from deploykit.onnx_values import array_of, floats_of
from deploykit.optional import OptionalPackage, require
from deploykit.spec import Int8

PACKAGE = OptionalPackage(
    module="nncf",
    distribution="nncf",
    extra="nncf",
    feature="recipe='nncf'",
    prepare="deploykit.calibration.nncf_quantizer:block_reports",
)
MOST_IMAGES = 300
"""How many images NNCF sees at most: what it takes by default."""


def block_reports() -> None:
    """Let nncf do without its reporter, which asks for an analytics host: a build machine's has none."""
    os.environ.setdefault("NNCF_CI", "1")


def quantize_by_nncf(
    model: ir.Model, plan: QuantizationPlan, statistics: Statistics, images: CalibrationSet, settings: Int8
) -> QuantizationPlan:
    """Return a plan with NNCF's ranges, integers and bias shifts in place of its own.

    Args:
        model: the FP32 master graph.
        plan: what `calibrate` gave for it, without bias correction.
        statistics: what that saw.
        images: what to calibrate with; `MOST_IMAGES` of them, evenly spaced.
        settings: the bias correction, and whether weights keep to 7 bits.

    Raises:
        CalibrationError: NNCF fails on the graph.
        MissingDependency: nncf is not installed.
    """
    quantized = ir.from_proto(run_nncf(model, images, settings))
    found = _quantizers(model, plan, quantized)
    taken = plan_of(found, plan.key).plan
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
    batches = _Batches(images=images.sample(MOST_IMAGES), size=graph_batch(model))
    source = str(model.graph.inputs[0].name)
    per_tensor = advanced.QuantizationParameters(per_channel=False)
    fix = advanced.OverflowFix.ENABLE if settings.reduce_range else advanced.OverflowFix.DISABLE
    is_transformer = any(node.op_type == "Softmax" for node in model.graph)
    try:
        with _quiet():
            return nncf.quantize(
                copy.deepcopy(ir.to_proto(model)),
                nncf.Dataset(batches, lambda batch: {source: batch}),
                preset=nncf.QuantizationPreset.MIXED,
                subset_size=len(batches),
                fast_bias_correction=settings.bias_correction != "full",
                model_type=nncf.ModelType.TRANSFORMER if is_transformer else None,
                advanced_parameters=advanced.AdvancedQuantizationParameters(
                    overflow_fix=fix,
                    disable_bias_correction=settings.bias_correction is None,
                    activations_quantization_params=per_tensor,
                    smooth_quant_alphas=advanced.AdvancedSmoothQuantParameters(convolution=-1, matmul=-1),
                ),
            )
    except Exception as error:  # nncf raises classes of its own, and those of onnx and onnxruntime
        raise CalibrationError(
            f"NNCF does not quantize this graph ({plain_reason(error)}). Fix: choose another recipe."
        ) from error


@dataclass(frozen=True, kw_only=True, eq=False)
class _Batches:
    """Images ``(N, C, H, W)`` in batches of the size that a graph takes; can be gone through again and again."""

    images: FloatArray
    size: int

    def __len__(self) -> int:
        return math.ceil(len(self.images) / self.size)

    def __iter__(self) -> Iterator[FloatArray]:
        for start in range(0, len(self.images), self.size):
            piece = self.images[start : start + self.size]
            yield piece[np.arange(self.size) % len(piece)]


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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep NNCF's progress bars and notices off the terminal: an error that it raises says it all."""
    logger = logging.getLogger("nncf")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
