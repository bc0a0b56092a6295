"""One plan for each precision, made from the master graph and images before any runtime is chosen."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import onnx_ir as ir

from deploykit.arrays import FloatArray
from deploykit.calibration.half import plan_half
from deploykit.calibration.images import CalibrationSet
from deploykit.calibration.nncf_quantizer import quantize_by_nncf
from deploykit.calibration.plan import QuantizationPlan, calibrate, plan_key
from deploykit.calibration.plan_cache import PlanCache, PlanKey
from deploykit.calibration.precision_plan import Bf16Plan, PrecisionPlan
from deploykit.calibration.reconstruction import RECONSTRUCTION_IMAGES, needs_reconstruction, reconstruct
from deploykit.calibration.statistics import Statistics
from deploykit.errors import CalibrationError, CalibrationWarning
from deploykit.onnx_session import graph_batch
from deploykit.spec import Bf16, Fp16, Int8, Precision


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How a plan is tuned by distillation: what does it, and the runtime that it is for; None: for every runtime."""

    run: Callable[[QuantizationPlan, CalibrationSet, Int8], QuantizationPlan]
    runtime: str | None


Gather: TypeAlias = Callable[[ir.Model, CalibrationSet, Int8, Callable[[Statistics], None]], Statistics]
"""Counts the statistics of a graph over images, and is heard after each batch."""


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
    tune: Tuning | None = None,
    gather: Gather | None = None,
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
        tune: tunes a plan by distillation; INT8 settings that ask for it need one, and no others call it.
        gather: counts the statistics elsewhere, to the same bits; None: here.
        on_image: called with the number of images calibrated so far.
        on_resume: called with the number of images after which a stopped calibration goes on.

    Raises:
        CalibrationError: INT8 without images: deploykit never calibrates on random data; a plan of other weights; or
            settings that ask for distillation, and nothing that does it.
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
    tune = _tuning(settings, tune)
    tuned_for = tune.runtime if tune is not None else None
    key = plan_key(weights_digest, images.digest, settings, tuned_for=tuned_for)

    kept = PlanKey.of(key, model)

    def make() -> QuantizationPlan:
        checkpoint = cache.checkpoint(kept) if cache is not None and gather is None else None
        preprocessing = images.spec.preprocessing
        started = checkpoint.started(preprocessing) if checkpoint else Statistics(preprocessing)
        if started.images:
            on_resume(started.images)

        def heard(found: Statistics) -> None:
            if checkpoint:
                checkpoint.keep(found)
            on_image(found.images)

        by_nncf = settings.by_nncf
        again = not by_nncf and needs_reconstruction(settings)
        counted = replace(settings, bias_correction=None) if again or by_nncf else settings
        if gather is not None:
            started = gather(model, images, counted, heard)
        plan = calibrate(
            model,
            () if gather is not None else images.batches(graph_batch(model), skip=started.batches),
            counted,
            key=key,
            weights_digest=weights_digest,
            started=started,
            on_batch=heard,
        )
        if by_nncf:
            plan = quantize_by_nncf(model, plan, started, images, settings)
        if again:
            plan = reconstruct(model, plan, images.sample(RECONSTRUCTION_IMAGES), settings)
        return plan if tune is None else tune.run(plan, images, settings)

    plan = make() if cache is None else cache.get_or_make(kept, make)
    for problem in (*plan.warnings, *images.surprises()):
        warnings.warn(problem, CalibrationWarning, stacklevel=2)
    if precision.float_dtype == settings.float_dtype:
        return plan
    own_key = plan_key(weights_digest, images.digest, precision, tuned_for=tuned_for)
    return replace(plan, key=own_key, float_dtype=precision.float_dtype)


def _tuning(settings: Int8, tune: Tuning | None) -> Tuning | None:
    """Return what tunes a plan of these settings; None where they do not ask for it.

    Raises:
        CalibrationError: they ask for it, and there is none.
    """
    if settings.rounding != "distilled":
        return None
    if tune is None:
        raise CalibrationError(
            "rounding='distilled' trains the network in torch, and only its ONNX graph was given. Fix: export the "
            "backbone, or choose another rounding."
        )
    return tune
