"""Runs named passes over an ONNX graph for one runtime's own operators, and proves after each that the numbers stand.

They run after the master graph was planned, so that the quantizer and the other runtimes see standard operators alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from deploykit.arrays import Array, FloatArray
from deploykit.errors import FusionError
from deploykit.fusion.pipeline import FusionRecord
from deploykit.onnx_session import onnx_session
from deploykit.parity.metrics import sqnr_db


@dataclass(frozen=True, kw_only=True)
class OnnxPass:
    """A rewrite in place of an ONNX graph; see `FusionPass`."""

    name: str
    rewrite: Callable[[ir.Model], int]
    min_sqnr_db: float


ROUNDING_MARGIN_DB = 10.0
"""How much more than FP32's own rounding an exact pass may show.

A deep network enlarges a last bit more or less, as it falls: pixels of one image changed in their last bit left
90 to 110 dB at the features of a MobileNetV3 with random weights.
"""

_NUDGES = 4


def run_onnx_passes(
    model: ir.Model, images: FloatArray, passes: tuple[OnnxPass, ...]
) -> tuple[ir.Model, tuple[FusionRecord, ...]]:
    """Apply passes in order to copies of a model, compared on ``images`` ``(N, C, H, W)`` after each that rewrites.

    They are compared in FP32, so no pass is held to more than what FP32's rounding leaves: how far the results are
    from those without any optimization and for images that differ in their last bit, less ``ROUNDING_MARGIN_DB``.

    Raises:
        FusionError: a pass raised, or changed the numbers by more than it promises.
    """
    records: list[FusionRecord] = []
    for step in passes:
        done = ", ".join(record.name for record in records) or "none"
        rewritten = model.clone()
        try:
            rewrites = step.rewrite(rewritten)
        except Exception as error:
            raise FusionError(f"the pass {step.name!r} failed: {error}. Passes already run: {done}.") from error
        kept = _worst_db(_outputs(model, images), _outputs(rewritten, images)) if rewrites else float("inf")
        if not kept >= step.min_sqnr_db and not kept >= _rounding_db(model, images) - ROUNDING_MARGIN_DB:
            raise FusionError(
                f"the pass {step.name!r} changed the numbers: {kept:.1f} dB against before, it promises "
                f"{step.min_sqnr_db:.0f} dB. Passes already run: {done}."
            )
        model = rewritten if rewrites else model
        records.append(FusionRecord(name=step.name, rewrites=rewrites, sqnr_db=kept))
    return model, tuple(records)


def _rounding_db(model: ir.Model, images: FloatArray) -> float:
    found, generator = _outputs(model, images), np.random.default_rng(0)
    others = [_outputs(model, images, optimize=False)]
    for _ in range(_NUDGES):
        towards = np.where(generator.random(images.shape) < 0.5, np.float32(-np.inf), np.float32(np.inf))
        others.append(_outputs(model, np.nextafter(images, towards)))
    return min(_worst_db(other, found) for other in others)


def _worst_db(before: list[Array], after: list[Array]) -> float:
    return min(sqnr_db(old, new) for old, new in zip(before, after, strict=True))


def _outputs(model: ir.Model, images: FloatArray, *, optimize: bool = True) -> list[Array]:
    source = str(model.graph.inputs[0].name)
    return onnx_session(model, optimize=optimize).run(None, {source: images})
