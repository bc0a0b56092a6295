"""Which weights FP16 must not round: found by measuring each one's share of the error.

Half precision has 11 bits of mantissa, and a few layers of mobile networks need more: the first
depthwise convolution of EfficientNet-Lite0 alone brings the features from 49 to 41 dB.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from deploykit.arrays import Array, FloatArray
from deploykit.calibration.placement import place
from deploykit.onnx_session import GraphSession, batches_of, graph_batch, onnx_session
from deploykit.parity.metrics import sqnr_db

MARGIN_DB = 5.0
"""How far above the budget the predicted error must stay: activations are rounded as well."""
MEASURED_IMAGES = 4


@dataclass(frozen=True, kw_only=True)
class HalfPlan:
    """The weights that stay in float32, with the SQNR in dB that rounding each one alone would leave."""

    float_weights: dict[str, float]


def plan_half(model: ir.Model, images: FloatArray, *, min_sqnr_db: float) -> HalfPlan:
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
    source = str(model.graph.inputs[0].name)
    batches = batches_of(images, graph_batch(model), MEASURED_IMAGES)

    def run(changed: Iterable[str]) -> list[Array]:
        feed = values | {name: rounded[name] for name in changed}
        return [output for batch in batches for output in session.run(None, {source: batch, **feed})]

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


def _open_weights(model: ir.Model, names: Iterable[str]) -> tuple[GraphSession, dict[str, FloatArray]]:
    """Return a session whose weights are inputs, so that one session measures every weight."""
    opened = model.clone()
    weights = {}
    for name in names:
        value = opened.graph.initializers.pop(name)
        if value.const_value is not None:
            weights[name] = np.ascontiguousarray(value.const_value.numpy())
        value.const_value = None
        opened.graph.inputs.append(value)
    return onnx_session(opened), weights
