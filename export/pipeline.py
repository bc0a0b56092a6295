"""From a backbone to a bundle: a straight run from artefact to artefact, the same for every runtime."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from deploykit.arrays import FloatArray, ImageArray
from deploykit.backends.backend import resolve
from deploykit.bundle import Manifest, write_manifest, writing
from deploykit.calibration.cluster_statistics import count_on_cluster
from deploykit.calibration.dialect import Dialect
from deploykit.calibration.images import CalibrationSet
from deploykit.calibration.plan import QuantizationPlan
from deploykit.calibration.plan_cache import PlanCache
from deploykit.calibration.precision import plan_precision
from deploykit.calibration.precision_plan import PrecisionPlan
from deploykit.calibration.recipes import RecipeReport
from deploykit.calibration.search import Measured, SearchReport, SearchResult
from deploykit.export.conversion import operator_named, prove_conversion
from deploykit.export.evaluate import Evaluator
from deploykit.export.graphs import output_specs
from deploykit.export.job import ExportJob, checked
from deploykit.export.measure import parity_images, torch_outputs
from deploykit.export.mixed import search_mixed_precision
from deploykit.export.recipe_trials import settle_recipe
from deploykit.export.scaling import scaling_passes
from deploykit.export.size_corners import prove_sizes
from deploykit.export.speed import SpeedReport, check_speedup
from deploykit.export.target_checks import check_fits
from deploykit.export.to_onnx import to_onnx
from deploykit.export.trace import output_names, trace
from deploykit.export.tuning import tuning
from deploykit.fusion.pipeline import FusionRecord, export_passes, fuse
from deploykit.graph import Master, OnnxGraph, TorchProgram
from deploykit.images.preprocess import network_images
from deploykit.labels import LABELS_FILE
from deploykit.parity.baseline import BASELINE_FILE
from deploykit.parity.reference import REFERENCE_FILE, capture
from deploykit.parity.report import PARITY_FILE, ParityReport
from deploykit.progress import ImagesCalibrated, Progress, StageStarted, quiet
from deploykit.spec import InputSpec, Int8
from deploykit.trust import remember_engine

SEARCH_FILE = "mixed-precision.json"
RECIPES_FILE = "recipes.json"

TRAINED = "the trained network with its roundings"
"""What the report of a network after quantization-aware training says that it was compared with."""


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """What an export made and saw; the same is in the bundle's files.

    ``speed`` is None where nothing was timed, ``search`` without mixed precision, ``recipes`` where none was chosen
    by trying.
    """

    folder: Path
    manifest: Manifest
    parity: ParityReport
    speed: SpeedReport | None = None
    search: SearchReport | None = None
    recipes: RecipeReport | None = None

    @property
    def status(self) -> str:
        """What was seen of the engine: ``built``, ``executed`` or ``parity_checked``."""
        return self.manifest.status


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What an export has before an engine is built.

    ``images`` are those to compare on, as an engine takes them (``input``); ``probe`` are the same as the network
    takes them, ``(N, C, H, W)`` float32. ``plan`` is as the runtime's dialect renders it: what that keeps in float is
    in its ``float_nodes``.
    """

    input: InputSpec
    images: ImageArray
    probe: FloatArray
    master: Master
    plan: PrecisionPlan
    fusions: tuple[FusionRecord, ...]


def export(job: ExportJob, folder: Path, *, overwrite: bool = False, progress: Progress = quiet) -> ExportResult:
    """Write the bundle of a job to ``folder``, whole or not at all.

    Raises:
        SpecError: the runtime cannot make what is asked for.
        CalibrationError: INT8 without images, or images that cannot be used.
        FusionError, ExportError: a stage failed; the message says which.
        ParityError: the engine's numbers are outside the budget of its precision.
        BundleError: the folder is taken, or cannot be written.
    """
    job = checked(job)
    with writing(folder, overwrite=overwrite) as staging:
        job, recipes = settle_recipe(job, progress, evaluate_job)
        network = prepare(job, progress)
        expected = _expected(job, network)
        with Evaluator(job, network, expected, progress) as engines:
            conversion = prove_conversion(engines, progress)
            search = _search(engines, progress)
            plan = search.plan if search is not None else network.plan
            with operator_named(engines):
                progress(StageStarted(name="render"))
                rendered = engines.render(plan)
                progress(StageStarted(name="lower"))
                built = engines.lower(rendered, staging)
                check_fits(job, built.engine, staging)
                progress(StageStarted(name="parity"))
                parity, manifest = engines.compare(built, staging)
                corners = prove_sizes(engines, built, manifest, staging)
                parity = replace(parity, further=corners)
                parity.raise_for_failures()
            parity = parity.with_errors({"conversion": conversion})
            if job.trained is not None:
                parity = replace(parity, reference=TRAINED)
            baseline = None
            with engines.opened(manifest, staging) as model:
                if model is not None:
                    parity = parity.with_errors(engines.errors_apart(built, model))
                    baseline = engines.baseline(model) if job.options.probe_levels else None
            speed = _speed(engines, plan, manifest, staging, progress)
        progress(StageStarted(name="bundle"))
        _save_reference(network, expected, manifest, staging)
        if baseline is not None:
            baseline.save(staging / BASELINE_FILE)
        if isinstance(plan, QuantizationPlan):
            plan.save(staging)
        result = ExportResult(
            folder=folder,
            manifest=replace(manifest, speedup=None if speed is None else round(speed.speedup, 3)),
            parity=parity,
            speed=speed,
            search=None if search is None else search.report,
            recipes=recipes,
        )
        written = write_reports(result, staging, job.labels or job.backbone.labels)
    if job.backend.is_code(written.manifest.engine):
        remember_engine(written.manifest)
    return written


def _save_reference(network: Prepared, expected: dict[str, FloatArray], manifest: Manifest, staging: Path) -> None:
    images = network.images.astype(np.float32)  # which has every uint8: the reference's one dtype
    reference = capture(images, {output.name: expected[output.name] for output in manifest.outputs})
    reference.save(staging / REFERENCE_FILE)


def evaluate_job(job: ExportJob, held_out: CalibrationSet) -> Measured:
    """Build a job's engine and compare it on images that it was not calibrated with."""
    network = prepare(job, quiet, compared_on=held_out)
    with Evaluator(job, network, _expected(job, network), quiet) as engines:
        return engines.evaluate(network.plan)


def _expected(job: ExportJob, network: Prepared) -> dict[str, FloatArray]:
    """Return what an engine is compared with: torch in FP32, or a trained network with its roundings."""
    if job.trained is None:
        return torch_outputs(job.backbone, network.probe)
    return job.trained.outputs_of(network.probe)


def prepare(
    job: ExportJob, progress: Progress, compared_on: CalibrationSet | None = None, dialect: Dialect | None = None
) -> Prepared:
    """Trace, fuse, write the master graph and plan the precision of a checked job.

    Args:
        job: what to export, its recipe settled.
        progress: hears of the stages.
        compared_on: the images to compare on; None: some of those to calibrate with.
        dialect: says what of the plan stays in float; None: that of the runtime.

    Raises:
        CalibrationError: images that cannot be used.
        FusionError, ExportError: a stage failed; the message says which.
    """
    progress(StageStarted(name="trace"))
    spec = job.input.as_images()
    images = parity_images(compared_on or job.images, job.input)
    probe = network_images(images, job.input)
    program = trace(job.backbone, spec)
    progress(StageStarted(name="fuse"))
    scaling = scaling_passes(job.backbone, job.options.precision, job.images, spec)
    # Equalization is exact for pixels, and for the images that it measures where they were prepared in another way.
    measured = probe if compared_on is None else network_images(parity_images(job.images, job.input), job.input)
    fused = fuse(program, spec, measured, export_passes(*scaling))
    progress(StageStarted(name="to_onnx"))
    program = fused.program if job.trained is None else job.trained.put_into(fused.program)
    model = to_onnx(program, spec, output_names(job.backbone))
    outputs = output_specs(model)
    master = Master(
        onnx=OnnxGraph(input=spec, outputs=outputs, model=model),
        torch=TorchProgram(input=spec, outputs=outputs, program=program),
    )
    progress(StageStarted(name="plan"))
    plan = _plan(job, master, probe, progress)
    if isinstance(plan, QuantizationPlan):
        dialect = dialect or resolve(str(job.backend.dialect))
        plan = dialect.keep_float(model, plan)
    return Prepared(input=job.input, images=images, probe=probe, master=master, plan=plan, fusions=fused.records)


def _plan(job: ExportJob, master: Master, probe: FloatArray, progress: Progress) -> PrecisionPlan:
    total = len(job.images) if job.images is not None else 0
    model = master.onnx.model
    return plan_precision(
        model,
        job.options.precision,
        calibration=job.images,
        probe=probe,
        weights_digest=job.weights_digest,
        offered=job.plan if job.trained is None else job.trained.plan_of(model),
        cache=PlanCache() if job.options.cache else None,
        tune=tuning(job, master, progress),
        gather=partial(count_on_cluster, workers=job.options.workers) if job.options.ray else None,
        on_image=lambda seen: progress(ImagesCalibrated(done=min(seen, total), total=total)),
        on_resume=lambda seen: progress(ImagesCalibrated(done=min(seen, total), total=total, resumed=True)),
    )


def _search(engines: Evaluator, progress: Progress) -> SearchResult | None:
    """Search the layers to keep in float; None where no mixed precision was asked for."""
    plan, settings = engines.network.plan, engines.job.options.precision
    if not isinstance(plan, QuantizationPlan) or not isinstance(settings, Int8) or not settings.mixed_precision:
        return None
    progress(StageStarted(name="search"))
    return search_mixed_precision(plan, engines, settings, progress)


def _speed(
    engines: Evaluator, plan: PrecisionPlan, manifest: Manifest, folder: Path, progress: Progress
) -> SpeedReport | None:
    """Time an INT8 engine against float ones, where that was asked for and its device is here.

    Raises:
        ExportError: it is slower, or cannot be timed here, and a speedup is required.
    """
    options = engines.job.options
    if not isinstance(plan, QuantizationPlan) or not (options.time_against_fp32 or options.require_speedup):
        return None
    progress(StageStarted(name="speed"))
    report = engines.speed(manifest, folder, plan)
    if options.require_speedup:
        check_speedup(report, options.runtime)
    return report


def write_reports(result: ExportResult, staging: Path, labels: tuple[str, ...] | None) -> ExportResult:
    """Write the reports, the labels, and last the manifest with every file's digest."""
    result.parity.save(staging / PARITY_FILE)
    if result.search is not None:
        result.search.save(staging / SEARCH_FILE)
    if result.recipes is not None:
        result.recipes.save(staging / RECIPES_FILE)
    if labels:
        (staging / LABELS_FILE).write_text("\n".join(labels) + "\n", encoding="utf-8")
    return replace(result, manifest=write_manifest(staging, result.manifest))
