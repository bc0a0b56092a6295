"""One plan for each precision, made from the master graph and images before any runtime is chosen."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace

import onnx_ir as ir

from deploykit.arrays import FloatArray
from deploykit.calibration.half import plan_half
from deploykit.calibration.images import CalibrationSet
from deploykit.calibration.plan import QuantizationPlan, calibrate, plan_key
from deploykit.calibration.plan_cache import PlanCache, PlanKey
from deploykit.calibration.precision_plan import Bf16Plan, PrecisionPlan
from deploykit.calibration.reconstruction import RECONSTRUCTION_IMAGES, needs_reconstruction, reconstruct
from deploykit.calibration.statistics import Statistics
from deploykit.errors import CalibrationError, CalibrationWarning
from deploykit.onnx_session import graph_batch
from deploykit.spec import Bf16, Fp16, Int8, Precision


def check_images_given(precision: Precision, calibration: CalibrationSet | None) -> None:
    """Refuse INT8 without images.

    Raises:
        CalibrationError: deploykit never calibrates on random data.
    """
    if isinstance(precision, Int8) and calibration is None:
        raise CalibrationError(
            "int8 needs images to calibrate with, and none were given. Pass calibration=FOLDER (or files, an array, "
            "an iterable of batches): a hundred typical photographs are enough. Random data is never used."
        )


def plan_precision(
    model: ir.Model,
    precision: Precision,
    *,
    calibration: CalibrationSet | None,
    probe: FloatArray,
    weights_digest: str,
    offered: QuantizationPlan | None = None,
    cache: PlanCache | None = None,
    on_image: Callable[[int], None] = lambda seen: None,
    on_resume: Callable[[int], None] = lambda seen: None,
) -> PrecisionPlan:
    """Make the plan that a precision needs.

    Args:
        model: the FP32 master graph.
        precision: what is wanted.
        calibration: the images for INT8.
        probe: a few images ``(N, C, H, W)`` on which FP16's rounding is measured.
        weights_digest: the digest of the backbone's weights, part of the plan's key.
        offered: an INT8 plan that was made before, to use instead of calibrating.
        cache: where INT8 plans that were made before are; None calibrates always.
        on_image: called with the number of images calibrated so far.
        on_resume: called with the number of images after which a stopped calibration goes on.

    Raises:
        CalibrationError: INT8 without images: deploykit never calibrates on random data; or a plan of other weights.
    """
    if isinstance(precision, Fp16):
        return plan_half(model, probe, min_sqnr_db=precision.min_sqnr_db)
    if isinstance(precision, Bf16):
        return Bf16Plan()
    if not isinstance(precision, Int8):
        return None
    if offered is not None:
        offered.check_fits(model, weights_digest)
        return offered
    check_images_given(precision, calibration)
    assert calibration is not None  # noqa: S101  (just checked; narrows the type)
    # What stays in float changes no range: targets that differ in it alone share the calibration.
    images, settings = calibration, replace(precision.filled(), float_dtype="fp32")
    key = plan_key(weights_digest, images.digest, settings)

    kept = PlanKey.of(key, model)

    def make() -> QuantizationPlan:
        checkpoint = cache.checkpoint(kept) if cache is not None else None
        preprocessing = images.spec.preprocessing
        started = checkpoint.started(preprocessing) if checkpoint else Statistics(preprocessing)
        if started.images:
            on_resume(started.images)

        def heard(found: Statistics) -> None:
            if checkpoint:
                checkpoint.keep(found)
            on_image(found.images)

        again = needs_reconstruction(settings)
        plan = calibrate(
            model,
            images.batches(graph_batch(model), skip=started.batches),
            replace(settings, bias_correction=None) if again else settings,
            key=key,
            weights_digest=weights_digest,
            started=started,
            on_batch=heard,
        )
        return reconstruct(model, plan, images.sample(RECONSTRUCTION_IMAGES), settings) if again else plan

    plan = make() if cache is None else cache.get_or_make(kept, make)
    for problem in (*plan.warnings, *images.surprises()):
        warnings.warn(problem, CalibrationWarning, stacklevel=2)
    if precision.float_dtype == settings.float_dtype:
        return plan
    own_key = plan_key(weights_digest, images.digest, precision)
    return replace(plan, key=own_key, float_dtype=precision.float_dtype)
