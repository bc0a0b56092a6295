"""What could be done against the noise of INT8: each thing is tried on the same images, and none is guessed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from deploykit.backbones.weights import weights_digest
from deploykit.backends.backend import resolve
from deploykit.calibration.dialect import Dialect
from deploykit.calibration.distillation import FEWEST_IMAGES
from deploykit.calibration.images import CalibrationSet
from deploykit.calibration.plan import QuantizationPlan
from deploykit.calibration.plan_cache import PlanCache
from deploykit.calibration.precision import plan_precision
from deploykit.calibration.recipes import recipe_of, with_nncf_estimator
from deploykit.calibration.sensitivity import Cure, Sensitivity, Simulation
from deploykit.errors import CalibrationWarning
from deploykit.export.job import ExportJob
from deploykit.export.tuning import tuning
from deploykit.progress import CandidateMeasured, Progress, StageStarted, quiet
from deploykit.spec import Calibrator, Int8

if TYPE_CHECKING:
    from deploykit.export.pipeline import Prepared

FLOAT_LAYERS = (1, 2, 4, 8)
"""How many of the noisiest layers are left in float."""
MOST_MINUTES = 2.0
"""How long self-distillation may take here."""
LEAST_IMAGES = 4
"""With fewer calibration images no half of them is tried."""


def try_cures(job: ExportJob, network: Prepared, found: Sensitivity, progress: Progress) -> tuple[Cure, ...]:
    """Measure the whole network in integers with one thing changed at a time; the best first.

    Tried are the noisiest layers in float, other ranges, adaptive rounding, self-distillation for at most
    `MOST_MINUTES`, and half of the images: what the second half gained says what more of them would.

    Args:
        job: the export, its recipe settled.
        network: its master graph, plan and images.
        found: the sensitivity of its layers.
        progress: hears of each figure.
    """
    progress(StageStarted(name="cures"))
    before = min(found.together_db.values())
    cures = []
    for name, how, worst in (*_float_layers(job, network, found), *_other_plans(job, network)):
        cure = Cure(name=name, how=how, worst_db=round(worst, 2), gain_db=round(worst - before, 2))
        progress(CandidateMeasured(summary=f"{name}: {worst:.1f} dB ({cure.gain_db:+.1f})"))
        cures.append(cure)
    half = _half_of_images(job, network)
    if half is not None:
        count, worst = half
        name = f"all {len(job.images or ())} images instead of {count}"
        progress(CandidateMeasured(summary=f"{name}: {before - worst:+.1f} dB"))
        gain = round(before - worst, 2)
        cures.append(Cure(name=name, how="more images, as far as this still gains", worst_db=before, gain_db=gain))
    return tuple(sorted(cures, key=lambda cure: -cure.gain_db))


def _float_layers(job: ExportJob, network: Prepared, found: Sensitivity) -> Iterator[tuple[str, str, float]]:
    assert isinstance(network.plan, QuantizationPlan)  # noqa: S101  (of INT8; narrows the type)
    simulation = _simulation(job, network, network.plan)
    nodes = [entry.node for entry in sorted(found.nodes, key=lambda entry: -entry.noise)]
    for count in FLOAT_LAYERS:
        if count < len(nodes):
            worst = min(simulation.sqnr_db(nodes[count:]).values())
            layers = "the noisiest layer" if count == 1 else f"the {count} noisiest layers"
            yield f"{layers} in float", "--mixed-precision", worst


def _other_plans(job: ExportJob, network: Prepared) -> Iterator[tuple[str, str, float]]:
    settings = job.options.precision
    assert isinstance(settings, Int8)  # noqa: S101  (as above)
    settings = settings.filled()
    others: tuple[tuple[str, Calibrator], ...] = (("wider ranges", "minmax"), ("tighter ranges", "mse"))
    for name, calibrator in others:
        tried = replace(settings, calibrator=calibrator)
        tried = with_nncf_estimator(tried) if settings.by_nncf else tried
        if tried.calibrator != settings.calibrator:
            yield name, f"--calibrator {calibrator}", _worst(job, network, tried)
    if settings.by_nncf:  # its rounding is its own
        return
    adaptive = replace(settings, rounding="adaptive")
    recipe = recipe_of(adaptive)
    if settings.rounding != "adaptive" and recipe is not None:
        yield "adaptive rounding", f"--recipe {recipe}", _worst(job, network, adaptive)
    if settings.rounding != "distilled" and len(job.images or ()) >= FEWEST_IMAGES:
        minutes = min(settings.distill_minutes, MOST_MINUTES)
        distilled = replace(settings, rounding="distilled", distill_minutes=minutes)
        name = f"self-distillation for {minutes:g} minutes"
        yield name, "--recipe distilled", _worst(job, network, distilled)


def _half_of_images(job: ExportJob, network: Prepared) -> tuple[int, float] | None:
    """Return how many images half of them are, and the SQNR of a plan of these; None where there are too few."""
    settings, images = job.options.precision, job.images
    assert isinstance(settings, Int8)  # noqa: S101  (as above)
    if images is None or len(images) < LEAST_IMAGES:
        return None
    arrays = None if images.arrays is None else images.arrays[::2]
    half = replace(images, files=images.files[::2], arrays=arrays)
    return len(half), _worst(job, network, settings.filled(), half)


def _worst(job: ExportJob, network: Prepared, settings: Int8, images: CalibrationSet | None = None) -> float:
    """Return the SQNR of the output that suffers most, with a plan of other settings or other images."""
    model = network.master.onnx.model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)  # of the images, which the first plan has told
        plan = plan_precision(
            model,
            settings,
            calibration=images or job.images,
            probe=network.probe,
            weights_digest=weights_digest(job.backbone),
            cache=PlanCache() if job.options.cache else None,
            tune=tuning(job.with_precision(settings), network.master, quiet),
        )
    assert isinstance(plan, QuantizationPlan)  # noqa: S101  (as above)
    plan = _dialect(job).keep_float(model, plan)
    return min(_simulation(job, network, plan).sqnr_db(plan.placement.weights).values())


def _simulation(job: ExportJob, network: Prepared, plan: QuantizationPlan) -> Simulation:
    return Simulation(network.master.onnx.model, plan, network.probe, _dialect(job))


def _dialect(job: ExportJob) -> Dialect:
    dialect: Dialect = resolve(str(job.backend.dialect))
    return dialect
