"""NNCF's SmoothQuant: Op(W s, x * (1/s)) as NNCF writes it -> Op(W s, x'), with 1/s in what writes x.

NNCF (package nncf) finds one factor a channel for what each product reads, and puts a Mul there, which no integer
kernel fuses. Here the factor goes where the equalization puts its own: into the gain and shift of a norm, or the weight
and bias of the layer that writes the channel. A factor for which there is no such writer, as behind a GELU, is left
out, with that of the weight.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor
from torch.fx import GraphModule

from deploykit.arrays import FloatArray
from deploykit.calibration.channel_groups import ChannelGroup, channel_groups
from deploykit.calibration.equalization import scale_group
from deploykit.calibration.images import CalibrationSet
from deploykit.calibration.nncf_package import PACKAGE, Batches, is_transformer, running
from deploykit.fusion.constants import ATTENTION, operand
from deploykit.fusion.pipeline import EXACT_DB, FusionPass
from deploykit.graph import TRANSPOSED
from deploykit.onnx_values import floats_of
from deploykit.optional import require
from deploykit.spec import Int8, Precision

_MARK = "nncf_smooth_quant"
"""Ends the name of each Mul that NNCF adds."""
_ATTENTION = (ATTENTION, torch.ops.aten.softmax.int, torch.ops.aten._softmax.default)
"""What an ONNX graph has a Softmax for."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SmoothFactors:
    """What NNCF divides one tensor by, ``(C,)`` float32, and the weights that it multiplies, by initializer."""

    weights: tuple[str, ...]
    factors: FloatArray


def smoothing_passes(
    precision: Precision, calibration: CalibrationSet | None, to_graph: Callable[[GraphModule], ir.Model]
) -> tuple[FusionPass, ...]:
    """Return the passes that fold NNCF's factors, and count those left out; none where NNCF does not quantize.

    Args:
        precision: where it asks for the equalization of deploykit itself, that takes the place of SmoothQuant.
        calibration: the images for INT8.
        to_graph: writes a module as a master graph, whose initializers have the names of the module's constants.
    """
    if not isinstance(precision, Int8) or calibration is None:
        return ()
    if not precision.by_nncf or precision.filled().equalization is not None:
        return ()
    smoothing = _Smoothing(images=calibration, to_graph=to_graph)
    return (
        FusionPass(name="equalize-channels", rewrite=smoothing.fold, min_sqnr_db=EXACT_DB),
        FusionPass(name="nncf-factors-left-out", rewrite=lambda module: smoothing.left_out, min_sqnr_db=EXACT_DB),
    )


@dataclass(kw_only=True, eq=False)
class _Smoothing:
    images: CalibrationSet
    to_graph: Callable[[GraphModule], ir.Model]
    left_out: int = field(default=0, init=False)

    def fold(self, module: GraphModule) -> int:
        if not any(node.target in _ATTENTION for node in module.graph.nodes):  # and spare the conversion to ONNX
            return 0
        found = find_factors(self.to_graph(module), self.images)
        folded = fold_factors(module, found)
        self.left_out = len(found) - folded
        return folded


def find_factors(model: ir.Model, images: CalibrationSet) -> tuple[SmoothFactors, ...]:
    """Run NNCF's SmoothQuant with its default strengths; of a graph without attention nothing, as NNCF does.

    Raises:
        CalibrationError: NNCF fails on the graph.
        MissingDependency: nncf is not installed.
    """
    if not is_transformer(model):
        return ()
    nncf = require("nncf", PACKAGE)
    strengths = require("nncf.quantization.advanced_parameters", PACKAGE).AdvancedSmoothQuantParameters()
    algorithm = require("nncf.quantization.algorithms.smooth_quant.algorithm", PACKAGE)
    pipeline = require("nncf.quantization.algorithms.pipeline", PACKAGE)
    prepared = require("nncf.onnx.graph.passes", PACKAGE)
    batches, source = Batches.of(images, model), str(model.graph.inputs[0].name)
    alphas = {"convolution": strengths.convolution, "matmul": strengths.matmul}
    with running():
        smooth = algorithm.SmoothQuant(len(batches), False, alpha_map=alphas)
        proto = prepared.apply_preprocess_passes(copy.deepcopy(ir.to_proto(model)))
        smoothed = pipeline.Pipeline([[smooth]]).run(proto, nncf.Dataset(batches, lambda batch: {source: batch}))
    return tuple(
        SmoothFactors(
            weights=tuple(_weight_of(reader, model) for reader in node.outputs[0].consumers()),
            factors=np.asarray(1 / floats_of(node.inputs[1]).reshape(-1), np.float32),
        )
        for node in ir.from_proto(smoothed).graph
        if str(node.name).endswith(_MARK)
    )


def _weight_of(reader: ir.Node, model: ir.Model) -> str:
    constants = [str(value.name) for value in reader.inputs[:2] if value is not None]
    return next(name for name in constants if name in model.graph.initializers)


def fold_factors(module: GraphModule, found: tuple[SmoothFactors, ...]) -> int:
    """Put factors into what writes their channels, in place; exact in real arithmetic.

    Args:
        module: the flat graph of a fused program in FP32, whose constants have the names of the initializers.
        found: from `find_factors`.

    Returns:
        How many were put there; a Mul would be left for the others.
    """
    known = {name.removesuffix(TRANSPOSED): each for each in found for name in each.weights}
    folded: set[SmoothFactors] = set()
    for group in channel_groups(module):
        own = {known.get(str(operand(reader, 1).target)) for reader in group.readers}
        factors = _common(group, own)
        if factors is not None:
            scale_group(module, group, factors)
            folded |= {each for each in own if each is not None}
    module.recompile()
    return len(folded)


def _common(group: ChannelGroup, own: set[SmoothFactors | None]) -> Tensor | None:
    """Return the factors ``(C,)`` that all readers of a group have; None where they have none in common.

    A tensor that the network gives, or that is clipped, would need a Mul behind it.
    """
    first = next(iter(own))
    if first is None or group.outputs or group.clips or len(first.factors) != group.channels:
        return None
    if not all(each is not None and np.array_equal(each.factors, first.factors) for each in own):
        return None
    return torch.from_numpy(first.factors).double()
