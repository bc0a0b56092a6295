"""From a backbone and what is asked of it to the job of an export."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from deploykit.errors import WeightsWarning
from deploykit.labels import folder_labels
from deploykit.options import ExportOptions

if TYPE_CHECKING:
    from deploykit.backbones.base import BaseBackbone
    from deploykit.calibration.images import CalibrationSet, CalibrationSource
    from deploykit.calibration.plan import QuantizationPlan
    from deploykit.export.job import ExportJob
    from deploykit.spec import InputSpec


def make_job(
    backbone: BaseBackbone,
    options: ExportOptions,
    calibration: CalibrationSource | None,
    *,
    skip_corrupt: bool = False,
    plan: QuantizationPlan | None = None,
) -> ExportJob:
    """Return the checked job of an export; ``plan`` is an INT8 plan that was made before."""
    from deploykit.calibration.images import calibration_set
    from deploykit.export.job import ExportJob, checked

    _warn_of_guess(backbone)
    images = None
    if calibration is not None:
        spec = backbone.input_spec.as_pixels() if options.embed_preprocessing else backbone.input_spec
        images = calibration_set(calibration, spec, skip_corrupt=skip_corrupt)
    labels = _labels(backbone, calibration, images)
    return checked(ExportJob(backbone=backbone, options=options, images=images, labels=labels, plan=plan))


def _labels(
    backbone: BaseBackbone, calibration: CalibrationSource | None, images: CalibrationSet | None
) -> tuple[str, ...] | None:
    """Return the class names of a backbone; else those of the class folders that it is calibrated with."""
    if backbone.labels is not None or "logits" not in backbone.spec.output_names:
        return backbone.labels
    if images is None or not isinstance(calibration, (str, os.PathLike)) or not Path(calibration).is_dir():
        return None
    return folder_labels(Path(calibration), images.files, backbone.spec.num_classes)


def _warn_of_guess(backbone: BaseBackbone) -> None:
    """Say that an engine will be fed as the variant's weights are, where the user's own say nothing of it."""
    if not backbone.guesses_preprocessing:
        return
    how = backbone.input_spec.preprocessing
    warnings.warn(
        f"{backbone.spec.weights} does not say how its images were prepared, so the engine takes {backbone.name}'s own "
        f"preprocessing: mean {how.mean}, std {how.std}, {how.interpolation}, crop_pct {how.crop_pct}, crop_mode "
        f"{how.crop_mode}. Fix: say how the weights were trained with preprocessing=, also where it is the same.",
        WeightsWarning,
        stacklevel=2,
    )


def shared_images(
    source: CalibrationSource | None, spec: InputSpec, *, skip_corrupt: bool = False
) -> CalibrationSource | None:
    """Return images that several jobs can be made with: batches, which can be read only once, are kept.

    Files stay what they are, since their folders may name the classes.

    Args:
        source: the images; None: none.
        spec: how arrays among them are read.
        skip_corrupt: leave unreadable images out with a warning.
    """
    paths = (str, os.PathLike)
    if source is None or isinstance(source, paths):
        return source
    if isinstance(source, (list, tuple)) and all(isinstance(each, paths) for each in source):
        return source
    from deploykit.calibration.images import calibration_set

    return calibration_set(source, spec, skip_corrupt=skip_corrupt)
