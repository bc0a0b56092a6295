"""The walk over a network's integer nodes that rounds each weight, and corrects each bias, for what the node reads.

"fast" takes what the FP32 network gives a node to read. "full" goes from the images down and takes what
the network gives when all before the node is in integers already, so that a layer also makes up for the
mean error of those before it (Nagel et al. 2020, "Up or Down?", section 3.3, for the order; 2019,
"Data-Free Quantization", section 4.2, for the means).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor

from deploykit.arrays import FloatArray
from deploykit.calibration.patches import LayerShape
from deploykit.calibration.plan import QuantizationPlan
from deploykit.calibration.ranges import quantize_weight
from deploykit.calibration.rounded_weight import RoundedWeight
from deploykit.calibration.rounding import clipped_scales, round_to_nearest, round_with_feedback
from deploykit.calibration.sensitivity import Simulation
from deploykit.onnx_values import floats_of
from deploykit.spec import Int8

RECONSTRUCTION_IMAGES = 32
"""How many calibration images are read; the ranges are from all of them."""
TOP, REDUCED_TOP = 127, 63
"""The largest integer, and the largest of which two with 8-bit activations add up in 16 bits whatever they are."""
LEAST_ROWS, MOST_ROWS, ROWS_A_COLUMN = 512, 4096, 16
"""How many rows of what a node reads its moments are from: so many for each of a row's numbers, within bounds."""
HELD_BYTES = 2**29
"""How much of what nodes read is held at once."""


def needs_reconstruction(settings: Int8) -> bool:
    """Return whether settings ask for more than one pass over the images finds."""
    settings = settings.filled()
    return settings.rounding == "adaptive" or settings.weight_scales != "max" or settings.bias_correction == "full"


def reconstruct(model: ir.Model, plan: QuantizationPlan, images: FloatArray, settings: Int8) -> QuantizationPlan:
    """Return the plan with every weight rounded, and every bias shifted, as the settings ask.

    Args:
        model: the FP32 master graph.
        plan: its placement and ranges.
        images: ``(N, C, H, W)`` calibration images; a few dozen.
        settings: ``rounding``, ``weight_scales`` and ``bias_correction``; "full" rounds what weighted nodes
            read, and not what residual additions and pools do.

    Raises:
        CalibrationError: a convolution that is not over images.
    """
    settings = settings.filled()
    simulation = Simulation(model, plan, images, most=len(images))
    layers = _layers(model, plan)
    sequential = settings.bias_correction == "full"
    weights: dict[str, RoundedWeight] = {}
    shifts: dict[str, npt.NDArray[np.float32]] = {}
    for names in _chunks(layers, sequential=sequential):
        exact = _rows(simulation, layers, names, quantized=())
        read = _rows(simulation, layers, names, quantized=(*weights, *names)) if sequential else exact
        for name in names:
            layer = layers[name]
            integers, scales = _round(layer, read[name], settings, reduce_range=plan.reduce_range)
            rounded = integers * scales.unsqueeze(2)
            if settings.bias_correction is not None:
                shifts[name] = _shift(layer, exact[name], rounded, read[name])
            if sequential:
                simulation.round_to(name, layer.shape.restore(rounded), shifts[name])
            weights[name] = RoundedWeight.of(
                layer.weight,
                layer.shape.axis,
                layer.shape.restore(integers).astype(np.int8),
                scales.reshape(-1).numpy(),
            )
    return replace(plan, weights=weights, bias_shift=shifts)


@dataclass(frozen=True, kw_only=True)
class _Layer:
    weight: FloatArray
    shape: LayerShape
    input: str


def _layers(model: ir.Model, plan: QuantizationPlan) -> dict[str, _Layer]:
    nodes = {str(node.name): node for node in model.graph}
    layers = {}
    for name, use in plan.placement.weights.items():
        weight = floats_of(model.graph.initializers[use.weight])
        layers[name] = _Layer(weight=weight, shape=LayerShape.of(nodes[name], weight.shape, use.axis), input=use.input)
    return layers


def _chunks(layers: dict[str, _Layer], *, sequential: bool) -> Iterator[list[str]]:
    """Nodes that are looked at in one pass: those that read one tensor, or as many as memory allows."""
    chunk: list[str] = []
    held = 0
    for name, layer in layers.items():
        size = 4 * _row_count(layer.shape) * layer.shape.row_size
        full = held + size > HELD_BYTES
        if chunk and (layer.input != layers[chunk[-1]].input if sequential else full):
            yield chunk
            chunk, held = [], 0
        chunk.append(name)
        held += size
    if chunk:
        yield chunk


def _rows(
    simulation: Simulation, layers: dict[str, _Layer], names: Sequence[str], *, quantized: Sequence[str]
) -> dict[str, Tensor]:
    """Return ``(groups, rows, K)`` of what each node reads, the same positions whatever is quantized."""
    pieces: dict[str, list[FloatArray]] = {name: [] for name in names}
    for seed, batch in enumerate(simulation.batches):
        found = simulation.read_by(names, batch, quantized)
        for name, values in zip(names, found, strict=True):
            shape = layers[name].shape
            pieces[name].append(shape.rows(values, max(1, _row_count(shape) // len(simulation.batches)), seed))
    return {name: torch.from_numpy(np.concatenate(parts)).transpose(0, 1) for name, parts in pieces.items()}


def _row_count(shape: LayerShape) -> int:
    return min(max(ROWS_A_COLUMN * shape.row_size // shape.groups, LEAST_ROWS), MOST_ROWS)


def _round(layer: _Layer, read: Tensor, settings: Int8, *, reduce_range: bool) -> tuple[Tensor, Tensor]:
    """Return Integers ``(groups, channels, K)`` and scales ``(groups, channels)`` of a weight."""
    axis, matrix = layer.shape.axis, layer.shape.matrix(layer.weight)
    if settings.rounding == "nearest" and settings.weight_scales == "max":
        integers, nearest = quantize_weight(layer.weight, axis, reduce_range=reduce_range)
        return layer.shape.matrix(integers).float(), torch.from_numpy(nearest).reshape(matrix.shape[:2])
    top = REDUCED_TOP if reduce_range else TOP
    scales = torch.from_numpy(quantize_weight(layer.weight, axis)[1] * np.float32(TOP / top)).reshape(matrix.shape[:2])
    centred = read - read.mean(1, keepdim=True) if settings.bias_correction is not None else read
    moments = centred.transpose(1, 2) @ centred / read.shape[1]
    if settings.weight_scales == "mse":
        scales = clipped_scales(matrix, scales, moments, top)
    if settings.rounding == "adaptive":
        return round_with_feedback(matrix, scales, moments, top), scales
    return round_to_nearest(matrix, scales, top), scales


def _shift(layer: _Layer, exact: Tensor, rounded: Tensor, read: Tensor) -> npt.NDArray[np.float32]:
    """Return the mean of what a node gives in FP32 less that of what it gives rounded, ``(channels,)``."""
    before = layer.shape.matrix(layer.weight) @ exact.mean(1).unsqueeze(2)
    after = rounded @ read.mean(1).unsqueeze(2)
    return (before - after).reshape(-1).numpy()
