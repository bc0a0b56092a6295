"""The sensitivity of a backbone's layers to INT8, as an export would quantize them; no engine is built."""

from __future__ import annotations

from deploykit.backbones.weights import weights_digest
from deploykit.calibration.equalization import equalization_passes
from deploykit.calibration.images import network_images
from deploykit.calibration.plan import QuantizationPlan
from deploykit.calibration.plan_cache import PlanCache
from deploykit.calibration.precision import plan_precision
from deploykit.calibration.sensitivity import Sensitivity, measure_sensitivity, style_of
from deploykit.errors import SpecError
from deploykit.export.measure import parity_images
from deploykit.export.pipeline import ExportRequest, Progress, check_request, engine_input
from deploykit.export.to_onnx import to_onnx
from deploykit.export.trace import output_names, trace
from deploykit.fusion.pipeline import EXPORT_PASSES, fuse


def sensitivity(request: ExportRequest, *, progress: Progress | None = None) -> Sensitivity:
    """Measure how much noise each layer makes that an INT8 export of this request would quantize.

    Raises:
        SpecError: the request is not of INT8, or the runtime cannot make it.
        CalibrationError: no images, or images that cannot be used.
    """
    check_request(request)
    if request.precision.name != "int8":
        raise SpecError(f"sensitivity is of int8, and precision is {request.precision.name!r}. Ask for int8.")
    progress = progress or Progress()
    progress.stage("trace")
    taken = engine_input(request)
    spec = taken.as_images()
    probe = network_images(parity_images(request.calibration, taken), taken)
    program = trace(request.backbone, spec)
    progress.stage("fuse")
    balancing = equalization_passes(request.precision, request.calibration, spec)
    fused = fuse(program, spec, probe, (*EXPORT_PASSES, *balancing))
    progress.stage("to_onnx")
    model = to_onnx(fused.program, spec, output_names(request.backbone))
    progress.stage("plan")
    total = len(request.calibration or ())
    plan = plan_precision(
        model,
        request.precision,
        calibration=request.calibration,
        probe=probe,
        weights_digest=weights_digest(request.backbone),
        cache=PlanCache() if request.cache else None,
        on_image=lambda seen: progress.images(min(seen, total), total),
    )
    assert isinstance(plan, QuantizationPlan)  # noqa: S101  (of INT8, as checked above; narrows the type)
    progress.stage("sensitivity")
    return measure_sensitivity(model, plan, probe, style_of(request.runtime))
