"""From a backbone to a bundle: a straight run from artefact to artefact, the same for every runtime."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from deploykit.backbones.weights import weights_digest
from deploykit.bundle import Manifest, write_manifest, writing
from deploykit.calibration.dialects import DIALECTS
from deploykit.calibration.equalization import equalization_passes
from deploykit.calibration.images import CalibrationSet, network_images
from deploykit.calibration.plan import QuantizationPlan
from deploykit.calibration.plan_cache import PlanCache
from deploykit.calibration.precision import PrecisionPlan, plan_precision
from deploykit.calibration.recipes import AUTO_RECIPE, RecipeReport, with_recipe
from deploykit.calibration.search import Measured, SearchResult
from deploykit.calibration.sensitivity import style_of
from deploykit.export.bench import Bench
from deploykit.export.build import Builder, Built
from deploykit.export.graphs import output_specs
from deploykit.export.lowering import load_lowering, resolve
from deploykit.export.measure import parity_images, torch_outputs
from deploykit.export.mixed import mixed_precision
from deploykit.export.recipe_trials import recipe_trials
from deploykit.export.request import ExportRequest, cache_parts, check_request, engine_input, tool_versions
from deploykit.export.speed import SpeedReport, check_speedup
from deploykit.export.to_onnx import to_onnx
from deploykit.export.trace import output_names, trace
from deploykit.fusion.pipeline import FusionRecord, export_passes, fuse
from deploykit.graph import Graph
from deploykit.parity.reference import capture
from deploykit.runtimes.base import FloatArray, ImageArray
from deploykit.spec import InputSpec, Int8

SEARCH_FILE = "mixed-precision.json"
RECIPES_FILE = "recipes.json"
PARITY_FILE = "parity.json"
REFERENCE_FILE = "reference.npz"
LABELS_FILE = "labels.txt"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a caller hears of a running export.

    ``stage``: the one that begins. ``images``: calibrated, of how many. ``resumed``: a stopped calibration goes
    on after so many images, of how many. ``step``: a phase of the runtime's own build, its steps done, of how
    many (TensorRT). ``candidate``: each one of a search, in a line. ``speed``: how fast an INT8 engine is.
    """

    stage: Callable[[str], None] = lambda name: None
    images: Callable[[int, int], None] = lambda seen, total: None
    resumed: Callable[[int, int], None] = lambda seen, total: None
    step: Callable[[str, int, int], None] = lambda phase, done, total: None
    candidate: Callable[[str], None] = lambda summary: None
    speed: Callable[[SpeedReport], None] = lambda report: None


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What an export has before any runtime decides something.

    ``given`` are the images to compare on as an engine takes them (``taken``), ``probe`` the same as
    the network takes them, ``(N, C, H, W)`` float32. ``plan`` is as the runtime's dialect renders it: what
    that leaves in float is in its ``float_nodes``.
    """

    taken: InputSpec
    given: ImageArray
    probe: FloatArray
    master: Graph
    plan: PrecisionPlan
    fusions: tuple[FusionRecord, ...]


def prepare(request: ExportRequest, progress: Progress, compared_on: CalibrationSet | None = None) -> Prepared:
    """Trace, fuse, write the master graph and plan the precision of a checked request.

    Args:
        request: what to export, its recipe settled.
        progress: hears of the stages.
        compared_on: the images to compare on; None: some of those to calibrate with.

    Raises:
        CalibrationError: images that cannot be used.
        FusionError, ExportError: a stage failed; the message says which.
    """
    progress.stage("trace")
    taken = engine_input(request)
    spec = taken.as_images()
    given = parity_images(compared_on or request.calibration, taken)
    probe = network_images(given, taken)
    program = trace(request.backbone, spec)
    progress.stage("fuse")
    balancing = equalization_passes(request.precision, request.calibration, spec)
    fused = fuse(program, spec, probe, export_passes(*balancing))
    progress.stage("to_onnx")
    model = to_onnx(fused.program, spec, output_names(request.backbone))
    master = Graph(input=spec, outputs=output_specs(model), model=model, program=fused.program)
    progress.stage("plan")
    plan = _plan(request, model, probe, progress)
    if isinstance(plan, QuantizationPlan):
        plan = style_of(request.runtime).as_rendered(model, plan)
    return Prepared(taken=taken, given=given, probe=probe, master=master, plan=plan, fusions=fused.records)


def export(
    request: ExportRequest, folder: Path, *, overwrite: bool = False, progress: Progress | None = None
) -> Manifest:
    """Write the bundle of a request to ``folder``, whole or not at all.

    Raises:
        SpecError: the runtime cannot make what is asked for.
        CalibrationError: INT8 without images, or images that cannot be used.
        FusionError, ExportError: a stage failed; the message says which.
        ParityError: the engine's numbers are outside the budget of its precision.
        BundleError: the folder is taken, or cannot be written.
    """
    check_request(request)
    progress = progress or Progress()
    with writing(folder, overwrite=overwrite) as staging, ExitStack() as closing:
        request, tried = settle_recipe(request, progress)
        network = prepare(request, progress)
        builder = _builder(request, network, progress)
        expected = torch_outputs(request.backbone, network.probe)
        bench = closing.enter_context(_bench(request, network, builder, expected))
        found = _searched(request, network.plan, builder, bench, progress)
        plan = found.plan if found is not None else network.plan
        progress.stage("render")
        rendered = builder.rendered(plan)
        progress.stage("lower")
        built = builder.lowered(rendered, staging)
        progress.stage("parity")
        report, manifest = bench.parity(built, staging)
        report.raise_for_failures()
        speed = _timed(request, plan, partial(bench.speed, manifest, staging), progress)
        progress.stage("bundle")
        report.save(staging / PARITY_FILE)
        given_as_float = network.given.astype(np.float32)  # which has every uint8: the reference's one dtype
        kept = {output.name: expected[output.name] for output in built.graph.outputs}
        capture(given_as_float, kept).save(staging / REFERENCE_FILE)
        if isinstance(plan, QuantizationPlan):
            plan.save(staging)
        if found is not None:
            found.report.save(staging / SEARCH_FILE)
        if tried is not None:
            tried.save(staging / RECIPES_FILE)
        _write_labels(request.labels or request.backbone.labels, staging)
        return write_manifest(staging, replace(manifest, speedup=speed))


def settle_recipe(request: ExportRequest, progress: Progress) -> tuple[ExportRequest, RecipeReport | None]:
    """The request with the settings of its recipe, and what was tried where that was left to measurement.

    Raises:
        SpecError: no such recipe.
        CalibrationError: too few images to hold some out.
    """
    settings = request.precision
    if not isinstance(settings, Int8) or request.calibration is None:
        return request, None
    if settings.recipe != AUTO_RECIPE:
        return replace(request, precision=with_recipe(settings, request.backbone.family)), None
    progress.stage("recipes")

    def measure(chosen: Int8, calibrated: CalibrationSet, held_out: CalibrationSet) -> Measured:
        trial = replace(request, precision=chosen, calibration=calibrated, cache=False)
        return _trial(trial, held_out)

    report = recipe_trials(
        settings,
        request.calibration,
        measure,
        family=request.backbone.family,
        key=cache_parts(request) if request.cache else None,
        on_trial=lambda trial: progress.candidate(trial.summary),
    )
    return replace(request, precision=report.recipe.applied_to(settings)), report


def _trial(request: ExportRequest, held_out: CalibrationSet) -> Measured:
    """What an engine of a request gives on images that it was not calibrated with."""
    progress = Progress()
    network = prepare(request, progress, compared_on=held_out)
    builder = _builder(request, network, progress)
    with _bench(request, network, builder, torch_outputs(request.backbone, network.probe)) as bench:
        return bench.accuracy(network.plan)


def _builder(request: ExportRequest, network: Prepared, progress: Progress) -> Builder:
    return Builder(
        master=network.master,
        runtime=request.runtime,
        render=resolve(DIALECTS[request.runtime]),
        lower=load_lowering(request.runtime, request.build_options, portable=request.portable, on_step=progress.step),
        outputs=request.backbone.spec.output_names,
        taken=network.taken,
        probe=network.probe,
        target=request.target,
    )


def _bench(request: ExportRequest, network: Prepared, builder: Builder, expected: dict[str, FloatArray]) -> Bench:
    return Bench(
        builder=builder,
        manifest_of=partial(_manifest, request, network.taken, network.fusions),
        images=network.given,
        expected=expected,
        precision=request.precision,
        probe_levels=request.probe_levels,
        metric=request.metric,
    )


def _manifest(request: ExportRequest, taken: InputSpec, fusions: tuple[FusionRecord, ...], built: Built) -> Manifest:
    """The manifest of an engine that was built and not yet run."""
    quantized = request.calibration is not None and isinstance(request.precision, Int8)
    return Manifest(
        backbone=request.backbone.spec,
        input=taken,
        outputs=built.graph.outputs,
        runtime=request.runtime,
        runtime_version=built.engine.runtime_version,
        precision=request.precision.name,
        precision_settings=asdict(request.precision),
        engine=built.engine.file,
        target=request.target,
        requires=built.engine.requires,
        weights_digest=weights_digest(request.backbone),
        calibration_digest=request.calibration.digest if request.calibration and quantized else None,
        fusions={record.name: record.rewrites for record in (*fusions, *built.records)},
        compiler=built.engine.compiler,
        tools=tool_versions() | built.engine.tools,
    )


def _searched(
    request: ExportRequest, plan: PrecisionPlan, builder: Builder, bench: Bench, progress: Progress
) -> SearchResult | None:
    """The mixed-precision search of a request; None where none was asked for."""
    settings = request.precision
    if not isinstance(plan, QuantizationPlan) or not isinstance(settings, Int8) or not settings.mixed_precision:
        return None
    progress.stage("search")
    return mixed_precision(
        plan, builder, bench, settings, resume=request.cache, on_candidate=lambda one: progress.candidate(one.summary)
    )


def _timed(
    request: ExportRequest,
    plan: PrecisionPlan,
    measure: Callable[[QuantizationPlan], SpeedReport | None],
    progress: Progress,
) -> float | None:
    """How many times as fast as FP32 an INT8 engine is, where that was asked for and can be timed here.

    Raises:
        ExportError: it is slower, or cannot be timed here, and a speedup is required.
    """
    if not isinstance(plan, QuantizationPlan) or not (request.time_against_fp32 or request.require_speedup):
        return None
    progress.stage("speed")
    report = measure(plan)
    if request.require_speedup:
        check_speedup(report, request.runtime)
    if report is None:
        return None
    progress.speed(report)
    return round(report.speedup, 3)


def _plan(request: ExportRequest, model: Any, probe: Any, progress: Progress) -> PrecisionPlan:
    total = len(request.calibration) if request.calibration is not None else 0
    return plan_precision(
        model,
        request.precision,
        calibration=request.calibration,
        probe=probe,
        weights_digest=weights_digest(request.backbone),
        cache=PlanCache() if request.cache else None,
        on_image=lambda seen: progress.images(min(seen, total), total),
        on_resume=lambda seen: progress.resumed(min(seen, total), total),
    )


def _write_labels(labels: tuple[str, ...] | None, staging: Path) -> None:
    if labels:
        (staging / LABELS_FILE).write_text("\n".join(labels) + "\n", encoding="utf-8")
