"""The mixed-precision search of an export: sensitivity, costs and candidates of the runtime that is exported for."""

from __future__ import annotations

from typing import Any

import numpy as np

import deploykit
from deploykit.backends.backend import resolve
from deploykit.calibration.plan import QuantizationPlan
from deploykit.calibration.search import SearchBudget, SearchLog, SearchResult, search
from deploykit.calibration.sensitivity import measure_sensitivity
from deploykit.export.evaluate import Evaluator
from deploykit.onnx_session import graph_batch
from deploykit.progress import CandidateMeasured, Progress
from deploykit.spec import Int8
from deploykit.store import Store


def search_mixed_precision(
    plan: QuantizationPlan, engines: Evaluator, settings: Int8, progress: Progress
) -> SearchResult:
    """Search the nodes to keep in float so that the engine is within the budget of its settings.

    Args:
        plan: everything in integers that can be.
        engines: builds and measures the candidates.
        settings: the budget; ``max_metric_drop`` is from the FP32 engine's metric.
        progress: hears of each candidate.
    """
    master, job = engines.network.master.onnx.model, engines.job
    metric = engines.fp32_metric()
    budget = SearchBudget(
        min_sqnr_db=settings.min_sqnr_db,
        min_top1_agreement=settings.min_top1_agreement,
        min_metric=None if metric is None else metric - (settings.max_metric_drop or 0.0),
    )
    return search(
        master,
        plan,
        measure_sensitivity(master, plan, engines.network.probe, resolve(str(job.backend.dialect))),
        lambda candidate: engines.evaluate(candidate, timed=True),
        budget,
        savings_ms=_savings(plan, engines),
        # A metric is the user's own code, so that what it gave before says nothing of what it gives.
        log=_log(plan, engines) if job.options.cache and metric is None else None,
        on_candidate=lambda candidate: progress(CandidateMeasured(summary=candidate.summary)),
    )


def _savings(plan: QuantizationPlan, engines: Evaluator) -> dict[str, float] | None:
    """Return what each node gains by running in integers, where the runtime's profile tells."""
    backend, network = engines.job.backend, engines.network
    if backend.profile is None:
        return None
    master = network.master.onnx.model
    batch = network.probe[np.arange(graph_batch(master)) % len(network.probe)]
    quantized: Any = engines.render(plan).graph
    savings: dict[str, float] | None = resolve(backend.profile)(master, quantized.model, plan.placement.weights, batch)
    return savings


def _log(plan: QuantizationPlan, engines: Evaluator) -> SearchLog:
    job = engines.job
    decides = {
        "plan": plan.key,
        "constants": plan.constants_digest,
        "runtime": job.options.runtime,
        "runtime_version": job.backend.installed_version(),
        "outputs": job.backbone.spec.output_names,
        "input": engines.network.input,
        "target": job.options.target_name,
        "tie": job.backend.machine_tie(),
        "deploykit": deploykit.__version__,
    }
    return SearchLog(Store(), decides, title=job.title)
