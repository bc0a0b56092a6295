"""Which weights FP16 must not round: found by measuring each one's share of the error.

Half precision has 11 bits of mantissa, and a few layers of mobile networks need more: the first
depthwise convolution of EfficientNet-Lite0 alone brings the features from 49 to 41 dB.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from deploykit.calibration.placement import place
from deploykit.calibration.plan import calibration_batch, onnx_session
from deploykit.parity.metrics import sqnr_db
from deploykit.runtimes.base import FloatArray

MARGIN_DB = 5.0
"""How far above the budget the predicted error must stay: activations are rounded as well."""
MEASURED_IMAGES = 4


@dataclass(frozen=True, kw_only=True)
class HalfPlan:
    """The weights that stay in float32, with the SQNR in dB that rounding each one alone would leave."""

    float_weights: dict[str, float]


def plan_half(model: onnx.ModelProto, images: FloatArray, *, min_sqnr_db: float) -> HalfPlan:
    """Choose the fewest weights to keep in float32, most harmful first, so that the rest meets a budget.

    Args:
        model: the FP32 master graph.
        images: ``(N, C, H, W)`` to measure on; `MEASURED_IMAGES` of them are used.
        min_sqnr_db: the budget of every output, in dB.
    """
    placed = place(model).weights.values()
    biases = {use.weight: use.bias for use in placed if use.bias}
    names = tuple(dict.fromkeys(use.weight for use in placed))
    session, values = _open_weights(model, dict.fromkeys((*names, *biases.values())))
    limit = np.finfo(np.float16).max
    rounded = {
        name: np.clip(value, -limit, limit).astype(np.float16).astype(np.float32) for name, value in values.items()
    }
    batches = _batches(model, images)

    def run(changed: Iterable[str]) -> list[FloatArray]:
        feed = values | {name: rounded[name] for name in changed}
        return [output for batch in batches for output in session.run(None, {model.graph.input[0].name: batch, **feed})]

    def kept(changed: Iterable[str]) -> float:
        return min(sqnr_db(before, after) for before, after in zip(reference, run(changed), strict=True))

    reference = run(())
    budget = min_sqnr_db + MARGIN_DB
    if kept(rounded) >= budget:
        return HalfPlan(float_weights={})
    alone = {name: kept([name, biases[name]] if name in biases else [name]) for name in names}
    worst_first = sorted(names, key=lambda name: alone[name])
    noise = {name: 10 ** (-alone[name] / 10) for name in names}
    count = 0
    while count < len(names) and sum(noise[name] for name in worst_first[count:]) > 10 ** (-budget / 10):
        count += 1
    return HalfPlan(float_weights={name: alone[name] for name in worst_first[:count]})


def _batches(model: onnx.ModelProto, images: FloatArray) -> list[FloatArray]:
    """`MEASURED_IMAGES` of the images, in the batch that the graph takes."""
    size = calibration_batch(model)
    chosen = images[np.arange(max(size, MEASURED_IMAGES)) % len(images)]
    return [chosen[start : start + size] for start in range(0, len(chosen) - size + 1, size)]


def _open_weights(model: onnx.ModelProto, names: Iterable[str]) -> tuple[Any, dict[str, npt.NDArray[np.float32]]]:
    """A session whose weights are inputs, so that one session measures every weight."""
    opened = ir.from_proto(model)
    weights = {}
    for name in names:
        value = opened.graph.initializers.pop(name)
        if value.const_value is not None:
            weights[name] = np.ascontiguousarray(value.const_value.numpy())
        value.const_value = None
        opened.graph.inputs.append(value)
    return onnx_session(ir.to_proto(opened)), weights
