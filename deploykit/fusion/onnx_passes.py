"""Passes over a rendered ONNX graph for one runtime's own operators, each proved like the passes over programs.

They run after the dialect, so that the quantizer and the other runtimes see standard operators alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from deploykit.errors import FusionError
from deploykit.fusion.onnx_attention import fuse_onnxruntime_attention
from deploykit.fusion.onnx_gates import fuse_onnxruntime_gates
from deploykit.fusion.onnx_groupnorm import convolve_groupnorm, spell_out_groupnorm
from deploykit.fusion.onnx_layernorm import flatten_layernorm
from deploykit.fusion.onnx_linear import fuse_onnxruntime_linear
from deploykit.fusion.onnx_pointwise import convolve_last_layers, convolve_mlps
from deploykit.fusion.onnx_separate_heads import separate_heads
from deploykit.fusion.pipeline import EXACT_DB, FusionRecord
from deploykit.graph import Graph
from deploykit.optional import require
from deploykit.parity.metrics import sqnr_db

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class OnnxPass:
    """A rewrite in place of an ONNX graph; see `FusionPass`."""

    name: str
    rewrite: Callable[[ir.Model], int]
    min_sqnr_db: float


ONNX_PASSES: dict[str, tuple[OnnxPass, ...]] = {
    "onnxruntime": (
        OnnxPass(name="onnxruntime-attention", rewrite=fuse_onnxruntime_attention, min_sqnr_db=EXACT_DB),
        OnnxPass(name="onnxruntime-gates", rewrite=fuse_onnxruntime_gates, min_sqnr_db=EXACT_DB),
        OnnxPass(name="onnxruntime-groupnorm", rewrite=convolve_groupnorm, min_sqnr_db=EXACT_DB),
        OnnxPass(name="onnxruntime-mlps", rewrite=convolve_mlps, min_sqnr_db=EXACT_DB),
        # Last: the projections of attention and the layers of MLPs are linear layers too.
        OnnxPass(name="onnxruntime-linear", rewrite=fuse_onnxruntime_linear, min_sqnr_db=EXACT_DB),
    ),
    "openvino": (
        OnnxPass(name="openvino-heads", rewrite=separate_heads, min_sqnr_db=EXACT_DB),
        OnnxPass(name="openvino-groupnorm", rewrite=spell_out_groupnorm, min_sqnr_db=EXACT_DB),
        OnnxPass(name="openvino-layernorm", rewrite=flatten_layernorm, min_sqnr_db=EXACT_DB),
        OnnxPass(name="openvino-mlps", rewrite=convolve_last_layers, min_sqnr_db=EXACT_DB),
    ),
}
"""What a runtime's graph goes through after its dialect; nothing for the runtimes that are not named."""


ROUNDING_MARGIN_DB = 10.0
"""How much more than FP32's own rounding an exact pass may show.

A deep network enlarges a last bit more or less, as it falls: pixels of one image changed in their last bit left
90 to 110 dB at the features of a MobileNetV3 with random weights.
"""

_NUDGES = 4
_INTO_INTEGERS = ("QuantizeLinear", "DynamicQuantizeLinear")


@dataclass(frozen=True, kw_only=True)
class SpecializedGraph:
    """A graph after the passes of its runtime, and what each of them did."""

    graph: Graph
    records: tuple[FusionRecord, ...]


def specialize(graph: Graph, runtime: str, images: FloatArray) -> SpecializedGraph:
    """Run a runtime's passes over a rendered graph, compared on the first batch of ``images`` ``(N, C, H, W)``.

    A graph with integers in it stays as its dialect rendered it: the last bit of a float decides there
    which integer comes next.

    Raises:
        FusionError: a pass failed or changed the numbers.
    """
    passes = ONNX_PASSES.get(runtime, ())
    if graph.model is None or not passes or any(node.op_type in _INTO_INTEGERS for node in graph.model.graph.node):
        return SpecializedGraph(graph=graph, records=())
    batch = graph.input.batch if isinstance(graph.input.batch, int) else 2
    model, records = run_onnx_passes(graph.model, images[np.arange(batch) % len(images)], passes)
    return SpecializedGraph(graph=replace(graph, model=model), records=records)


def run_onnx_passes(
    model: onnx.ModelProto, images: FloatArray, passes: tuple[OnnxPass, ...]
) -> tuple[onnx.ModelProto, tuple[FusionRecord, ...]]:
    """Apply passes in order to a copy of a model; numbers are compared in ONNX Runtime after each that rewrites.

    They are compared in FP32, so no pass is held to more than what FP32's rounding leaves: how far ONNX Runtime's
    results are from its own without any optimization and for images that differ in their last bit, less
    ``ROUNDING_MARGIN_DB``.

    Raises:
        FusionError: a pass raised, or changed the numbers by more than it promises.
    """
    records: list[FusionRecord] = []
    for step in passes:
        done = ", ".join(record.name for record in records) or "none"
        whole = ir.from_proto(model)
        try:
            rewrites = step.rewrite(whole)
        except Exception as error:
            raise FusionError(f"the pass {step.name!r} failed: {error}. Passes already run: {done}.") from error
        before, kept = model, float("inf")
        if rewrites:
            model = ir.to_proto(whole)
            kept = _worst_db(_outputs(before, images), _outputs(model, images))
        if not kept >= step.min_sqnr_db and not kept >= _rounding_db(before, images) - ROUNDING_MARGIN_DB:
            raise FusionError(
                f"the pass {step.name!r} changed the numbers: {kept:.1f} dB against before, it promises "
                f"{step.min_sqnr_db:.0f} dB. Passes already run: {done}."
            )
        records.append(FusionRecord(name=step.name, rewrites=rewrites, sqnr_db=kept))
    return model, tuple(records)


def _rounding_db(model: onnx.ModelProto, images: FloatArray) -> float:
    found, generator = _outputs(model, images), np.random.default_rng(0)
    others = [_outputs(model, images, optimized=False)]
    for _ in range(_NUDGES):
        towards = np.where(generator.random(images.shape) < 0.5, np.float32(-np.inf), np.float32(np.inf))
        others.append(_outputs(model, np.nextafter(images, towards), optimized=True))
    return min(_worst_db(other, found) for other in others)


def _worst_db(before: list[FloatArray], after: list[FloatArray]) -> float:
    return min(sqnr_db(old, new) for old, new in zip(before, after, strict=True))


def _outputs(model: onnx.ModelProto, images: FloatArray, *, optimized: bool = True) -> list[FloatArray]:
    runtime = require("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    if not optimized:
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    outputs: list[FloatArray] = session.run(None, {session.get_inputs()[0].name: images})
    return outputs
