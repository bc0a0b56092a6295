"""The mixed-precision search of an export: sensitivity, costs and candidates of the runtime that is exported for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx

import deploykit
from deploykit.cache import default_root
from deploykit.calibration.kernel_times import integer_savings
from deploykit.calibration.plan import QuantizationPlan, calibration_batch
from deploykit.calibration.search import Candidate, SearchBudget, SearchLog, SearchResult, search
from deploykit.calibration.sensitivity import measure_sensitivity, style_of
from deploykit.errors import ExportError
from deploykit.export.bench import Bench
from deploykit.export.build import Builder
from deploykit.optional import installed_version
from deploykit.runtimes.base import load_runtime
from deploykit.spec import Int8

COSTS = {"onnxruntime": integer_savings}
"""The runtimes whose profile says what each node gains by running in integers."""


def mixed_precision(
    plan: QuantizationPlan,
    builder: Builder,
    bench: Bench,
    settings: Int8,
    *,
    resume: bool,
    on_candidate: Callable[[Candidate], None] | None = None,
) -> SearchResult:
    """Search the nodes to keep in float so that the engine is within the budget of its settings.

    Args:
        plan: everything in integers that can be.
        builder: makes the engines.
        bench: measures them.
        settings: the budget; ``max_metric_drop`` is from the FP32 engine's metric.
        resume: keep measurements in the cache, and use those of a search that was stopped.
        on_candidate: hears of each candidate.

    Raises:
        ExportError: the master graph has no ONNX form.
    """
    master = builder.master.model
    if master is None:
        raise ExportError("the master graph has no ONNX form, and the search measures that. Trace it with to_onnx.")
    metric = bench.fp32_metric()
    budget = SearchBudget(
        min_sqnr_db=settings.min_sqnr_db,
        min_top1_agreement=settings.min_top1_agreement,
        min_metric=None if metric is None else metric - (settings.max_metric_drop or 0.0),
    )
    # A metric is the user's own code, so that what it gave before says nothing of what it gives.
    log = _log(plan, builder) if resume and metric is None else None
    return search(
        master,
        plan,
        measure_sensitivity(master, plan, builder.probe, style_of(builder.runtime)),
        bench.measured,
        budget,
        savings_ms=_savings(master, plan, builder),
        log=log,
        on_candidate=on_candidate,
    )


def _savings(master: onnx.ModelProto, plan: QuantizationPlan, builder: Builder) -> dict[str, float] | None:
    measure = COSTS.get(builder.runtime)
    quantized = builder.render(builder.master, plan).model
    if measure is None or quantized is None:
        return None
    batch = builder.probe[np.arange(calibration_batch(master)) % len(builder.probe)]
    return measure(master, quantized, plan.placement.weights, batch)


def _log(plan: QuantizationPlan, builder: Builder) -> SearchLog:
    parts = (
        plan.key,
        plan.constants_digest,
        builder.runtime,
        installed_version(load_runtime(builder.runtime).package),
        builder.outputs,
        str(builder.taken),
        builder.target,
        deploykit.__version__,
    )
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return SearchLog(Path(default_root()) / "searches" / f"{key}.jsonl", key)
