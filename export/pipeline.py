"""From a backbone to a bundle: a straight run from artefact to artefact, the same for every runtime."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import deploykit
from deploykit.backbones.base import BaseBackbone
from deploykit.backbones.weights import weights_digest
from deploykit.bundle import Manifest, write_manifest, writing
from deploykit.calibration.dialects import DIALECTS
from deploykit.calibration.images import CalibrationSet
from deploykit.calibration.plan import QuantizationPlan
from deploykit.calibration.precision import PrecisionPlan, check_images_given, plan_precision
from deploykit.errors import SpecError
from deploykit.export.graphs import output_specs, select
from deploykit.export.lowering import LOWERINGS, Lowering, check_target
from deploykit.export.measure import measure, parity_images, torch_outputs
from deploykit.export.to_onnx import to_onnx
from deploykit.export.trace import output_names, trace
from deploykit.fusion.pipeline import fuse
from deploykit.graph import Graph
from deploykit.labels import class_labels
from deploykit.optional import installed_version, require
from deploykit.parity.reference import capture
from deploykit.runtimes.base import load_runtime
from deploykit.spec import Batch, InputSpec, Precision

PARITY_FILE = "parity.json"
REFERENCE_FILE = "reference.npz"
LABELS_FILE = "labels.txt"
_TOOLS = ("torch", "onnx", "onnx_ir", "onnxscript", "onnxruntime")


class Dialect(Protocol):
    """Write a plan into a graph in the form that one runtime fuses."""

    def __call__(self, master: Graph, plan: PrecisionPlan) -> Graph:
        """A new graph; the master stays as it is."""
        ...


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """What to export. ``probe_levels``: also compare the levels inside an engine that gives only the head."""

    backbone: BaseBackbone
    runtime: str
    precision: Precision
    batch: Batch = 1
    calibration: CalibrationSet | None = None
    target: str | None = None
    probe_levels: bool = True


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a caller hears of a running export: the stage that begins, and images calibrated of how many."""

    stage: Callable[[str], None] = lambda name: None
    images: Callable[[int, int], None] = lambda seen, total: None


def check_request(request: ExportRequest) -> None:
    """Refuse what the runtime cannot make, before any work.

    Raises:
        SpecError: an unknown runtime, one that has no engine, or a precision that it lacks.
        CalibrationError: INT8 without images.
        MissingDependency: the runtime's package is not installed.
    """
    if request.runtime == "torch":
        raise SpecError(
            "the torch runtime is the module itself and has no engine to export. "
            f"Choose a runtime: {', '.join(LOWERINGS)}."
        )
    adapter = load_runtime(request.runtime)
    require(adapter.package)
    check_target(request.runtime, request.target)
    if request.precision.name not in adapter.precisions:
        raise SpecError(
            f"the {request.runtime} runtime has no {request.precision.name}; it has {', '.join(adapter.precisions)}."
        )
    check_images_given(request.precision, request.calibration)
    spec = request.backbone.spec
    if request.precision.min_top1_agreement is not None and "logits" not in spec.output_names:
        raise SpecError(
            f"min_top1_agreement needs logits, and this engine gives {', '.join(spec.output_names)}. "
            "Leave it out for features and embeddings."
        )


def cache_parts(request: ExportRequest) -> dict[str, object]:
    """All that decides an engine's bytes, for the key of the engine cache."""
    runtime_package = load_runtime(request.runtime).package
    return {
        "backbone": asdict(request.backbone.spec),
        "weights": weights_digest(request.backbone),
        "preprocessing": asdict(request.backbone.input_spec.preprocessing),
        "runtime": request.runtime,
        "runtime_version": installed_version(runtime_package),
        "precision": [request.precision.name, asdict(request.precision)],
        "batch": request.batch if isinstance(request.batch, int) else asdict(request.batch),
        "calibration": request.calibration.digest if request.calibration is not None else None,
        "target": request.target,
        "tools": _tools(),
        "deploykit": deploykit.__version__,
    }


def engine_input(request: ExportRequest) -> InputSpec:
    """The input of the engine: the backbone's, with the batch asked for."""
    spec = request.backbone.input_spec
    return InputSpec(
        batch=request.batch,
        channels=spec.channels,
        height=spec.height,
        width=spec.width,
        preprocessing=spec.preprocessing,
    )


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
    render: Dialect = _load(DIALECTS[request.runtime])
    lower: Lowering = _load(LOWERINGS[request.runtime])
    with writing(folder, overwrite=overwrite) as staging:
        progress.stage("trace")
        spec = engine_input(request)
        probe = parity_images(request.calibration, spec)
        program = trace(request.backbone, spec)
        progress.stage("fuse")
        fused = fuse(program, spec, probe)
        progress.stage("to_onnx")
        model = to_onnx(fused.program, spec, output_names(request.backbone))
        master = Graph(input=spec, outputs=output_specs(model), model=model, program=fused.program)
        progress.stage("plan")
        plan = _plan(request, model, probe, progress)
        quantized = isinstance(plan, QuantizationPlan)
        progress.stage("render")
        whole = render(master, plan)
        graph = select(whole, request.backbone.spec.output_names)
        progress.stage("lower")
        engine = lower(graph, staging, target=request.target)
        progress.stage("parity")
        manifest = Manifest(
            backbone=request.backbone.spec,
            input=spec,
            outputs=graph.outputs,
            runtime=request.runtime,
            runtime_version=engine.runtime_version,
            precision=request.precision.name,
            precision_settings=asdict(request.precision),
            engine=engine.file,
            target=request.target,
            requires=engine.requires,
            weights_digest=weights_digest(request.backbone),
            calibration_digest=request.calibration.digest if request.calibration and quantized else None,
            fusions={record.name: record.rewrites for record in fused.records},
            tools=_tools() | engine.tools,
        )
        expected = torch_outputs(request.backbone, probe)
        report, status = measure(
            manifest,
            staging,
            images=probe,
            expected=expected,
            precision=request.precision,
            graph=graph,
            whole=whole if request.probe_levels else None,
            lower=lower,
        )
        report.raise_for_failures()
        progress.stage("bundle")
        report.save(staging / PARITY_FILE)
        capture(probe, {output.name: expected[output.name] for output in graph.outputs}).save(staging / REFERENCE_FILE)
        if isinstance(plan, QuantizationPlan):
            plan.save(staging)
        _write_labels(request.backbone.spec.label_set, staging)
        return write_manifest(staging, replace(manifest, status=status))


def _plan(request: ExportRequest, model: Any, probe: Any, progress: Progress) -> PrecisionPlan:
    total = len(request.calibration) if request.calibration is not None else 0
    return plan_precision(
        model,
        request.precision,
        calibration=request.calibration,
        probe=probe,
        weights_digest=weights_digest(request.backbone),
        on_image=lambda seen: progress.images(min(seen, total), total),
    )


def _write_labels(label_set: str | None, staging: Path) -> None:
    labels = class_labels(label_set)
    if labels:
        (staging / LABELS_FILE).write_text("\n".join(labels) + "\n")


def _tools() -> dict[str, str]:
    return {name: version for name in _TOOLS if (version := installed_version(name))}


def _load(path: str) -> Any:
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)
