"""The door to quantization-aware training: a backbone that trains with an engine's roundings, and its export."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard, Union

from deploykit.backbones.request import make_request
from deploykit.backends.backend import resolve
from deploykit.backends.table import EVALUATOR
from deploykit.bundle_files import PLAN_FILE
from deploykit.errors import CalibrationError, SpecError
from deploykit.jobs import make_job
from deploykit.options import ExportOptions
from deploykit.processor import saturates
from deploykit.progress import Progress, quiet
from deploykit.spec import Int8, Precision, parse_precision

if TYPE_CHECKING:
    from torch import nn

    from deploykit.calibration.dialect import Dialect
    from deploykit.calibration.images import CalibrationSource
    from deploykit.calibration.plan import QuantizationPlan
    from deploykit.export.job import ExportJob
    from deploykit.export.qat import QatNetwork

PlanOrImages: TypeAlias = Union["QuantizationPlan", "CalibrationSource"]


def prepare_qat(
    model: str | nn.Module,
    plan: PlanOrImages,
    *,
    runtime: str | None = None,
    calibration: CalibrationSource | None = None,
    precision: str | Precision = "int8",
    progress: Progress = quiet,
    **options: Any,
) -> QatNetwork:
    """Return a module that rounds as an INT8 engine of the model does, to train in any PyTorch loop.

    It is called like the model, has the weights, biases and ranges for parameters, is saved and loaded by its state
    dict, and exported by ``export_backbone(network, FOLDER)``. The model stays as it is.

    Args:
        model: trained in FP32, as for `create_backbone`: a backbone, a module of your own, or a name.
        plan: where to begin: a `QuantizationPlan`, a bundle that has one, or images to calibrate with.
        runtime: round exactly what engines of this runtime round; None: what all have in common, so that an engine
            may round a little more.
        calibration: the images that a given plan was made of, where its recipe equalizes channels.
        precision: ``int8``, or `Int8` with the settings that the plan is made with.
        progress: called with each event.
        options: ``image_size``, ``in_channels`` and the other options of `create_backbone` that say which backbone it
            is.

    Raises:
        SpecError: no module, an unknown runtime, or another precision.
        CalibrationError: no plan, the plan of another network, or images that cannot be used.
        ExportError: torch cannot trace the model for any batch.
    """
    from deploykit.backbones.build import build_any
    from deploykit.calibration.fake_quantized_network import EVERY_RUNTIME
    from deploykit.export.pipeline import evaluate_job, prepare
    from deploykit.export.qat import QatNetwork, QatSource
    from deploykit.export.recipe_trials import settle_recipe
    from deploykit.export.tuning import float_network

    settings = parse_precision(precision)
    if not isinstance(settings, Int8):
        raise SpecError(f"precision is {settings.name!r}; training with roundings is for 'int8'. Leave it out.")
    given, images = _sources(plan, calibration)
    asked = ExportOptions(runtime=runtime or EVALUATOR, precision=settings)
    job = make_job(build_any(model, make_request(**options)), asked, images, plan=given)
    job, _ = settle_recipe(job, progress, evaluate_job)
    dialect: Dialect = EVERY_RUNTIME if runtime is None else resolve(str(job.backend.dialect))
    prepared = prepare(job, progress, dialect=dialect)
    source = QatSource(backbone=job.backbone, settings=_settings(job), images=job.images, runtime=runtime)
    return QatNetwork(source, float_network(job, prepared.master), _plan(prepared.plan), dialect)


def is_qat(model: object) -> TypeGuard[QatNetwork]:
    """Return whether a model is one that `prepare_qat` gave; torch itself is not needed to tell."""
    module = sys.modules.get("deploykit.export.qat")  # without it there is no such model
    return module is not None and isinstance(model, module.QatNetwork)


def qat_inside(model: Any) -> Any:
    """Return the network of `prepare_qat` that torch.compile or data parallelism wraps; every other model as it is."""
    if "deploykit.export.qat" not in sys.modules:
        return model
    from torch import nn

    from deploykit.backbones.module_copy import unwrapped

    inner = unwrapped(model) if isinstance(model, nn.Module) else model
    return inner if is_qat(inner) else model


def check_alone(options: Mapping[str, object], calibration: object) -> None:
    """Refuse what was settled when the network was prepared.

    Raises:
        SpecError: there is such an option, or images.
    """
    given = [*options, *(() if calibration is None else ("calibration",))]
    if given:
        raise SpecError(
            f"{', '.join(given)} was given beside a network that prepare_qat made, which has its own. Leave it out."
        )


def trained_job(network: QatNetwork, asked: ExportOptions) -> ExportJob:
    """Return the checked job that exports a trained network.

    Raises:
        SpecError: another precision, or a processor that the network was not trained for.
    """
    from deploykit.export.job import checked

    precision, source = asked.precision, network.source
    if not isinstance(precision, Int8):
        raise SpecError(
            f"precision is {precision.name!r}, and the network was trained with the roundings of 'int8'. Fix: leave "
            "precision out, or export the backbone that it was made of."
        )
    settings = replace(
        source.settings,
        min_sqnr_db=precision.min_sqnr_db,
        min_top1_agreement=precision.min_top1_agreement,
        float_dtype=precision.float_dtype,
        mixed_precision=precision.mixed_precision,
        max_metric_drop=precision.max_metric_drop,
    )
    plan = None if source.images is not None else network.quantized.start
    job = make_job(source.backbone, replace(asked, precision=settings), source.images, plan=plan)
    processor = asked.made_for.processor if asked.made_for is not None else asked.target
    if job.backend.uses_cpu and saturates(processor) and not network.quantized.start.reduce_range:
        raise SpecError(
            "products of 8-bit weights saturate on the engine's processor, and the network was trained without regard "
            "to that. Fix: prepare_qat(..., precision=Int8(reduce_range=True)), and train again."
        )
    return checked(replace(job, trained=network))


def _sources(
    plan: PlanOrImages, calibration: CalibrationSource | None
) -> tuple[QuantizationPlan | None, CalibrationSource | None]:
    """Tell a plan from images.

    Raises:
        CalibrationError: neither, or images twice.
    """
    from deploykit.calibration.plan import QuantizationPlan

    if plan is None:
        raise CalibrationError(
            "training with roundings begins with a plan, and none was given. Fix: give a QuantizationPlan, a bundle of "
            "int8, or images to calibrate with."
        )
    if isinstance(plan, (str, os.PathLike)) and (Path(plan) / PLAN_FILE).is_file():
        plan = QuantizationPlan.load(Path(plan))
    if isinstance(plan, QuantizationPlan):
        return plan, calibration
    if calibration is not None:
        raise CalibrationError(
            "plan and calibration are both images. Fix: give a QuantizationPlan, or a bundle of int8, beside "
            "calibration; or images alone."
        )
    return None, plan


def _settings(job: ExportJob) -> Int8:
    settings = job.options.precision
    assert isinstance(settings, Int8)  # noqa: S101  (checked at the door; narrows the type)
    return replace(settings.filled(), recipe=None)


def _plan(plan: object) -> QuantizationPlan:
    from deploykit.calibration.plan import QuantizationPlan

    assert isinstance(plan, QuantizationPlan)  # noqa: S101  (of INT8; narrows the type)
    return plan
