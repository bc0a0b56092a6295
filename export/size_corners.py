"""Prove an engine at the corners of its range of image sizes, and keep what torch gives there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional as F

from deploykit.arrays import FloatArray
from deploykit.calibration.images import CalibrationSet
from deploykit.export.measure import measure, synthetic_images, torch_outputs
from deploykit.image_sizes import size_text
from deploykit.images.preprocess import denormalize, network_images, normalize
from deploykit.parity.reference import capture, corner_file
from deploykit.parity.report import ParityReport
from deploykit.spec import InputSpec, Size

if TYPE_CHECKING:
    from deploykit.bundle import Manifest
    from deploykit.export.evaluate import Built, Evaluator

CORNER_IMAGES = 2
"""At each corner; the images are in the bundle, and those of the largest size are large."""


def prove_sizes(engines: Evaluator, built: Built, manifest: Manifest, folder: Path) -> tuple[ParityReport, ...]:
    """Compare an engine with torch at every corner of its range but the best size, where it was compared before.

    The references go into the folder, so that `verify` compares there too. Nothing for an engine of one size.

    Returns:
        A report for each corner, against the engine's budget.
    """
    spec = engines.network.input
    if spec.sizes is None:
        return ()
    reports = []
    for size in spec.sizes.corners:
        if size == spec.sizes.best:
            continue
        at = spec.at(size)
        probe = corner_images(engines.job.images, at)
        images = denormalize(probe, spec.preprocessing) if spec.embeds_preprocessing else probe
        expected = torch_outputs(engines.job.backbone, network_images(images, spec))
        report, _ = measure(
            manifest,
            folder,
            images=images,
            expected=expected,
            precision=engines.job.options.precision,
            graph=built.graph,
            whole=None,
            lower=engines.lower_graph,
            elsewhere=engines.job.is_elsewhere,
        )
        reports.append(replace(report, reference=f"{report.reference} at {size_text(size)}"))
        wanted = {output.name: expected[output.name] for output in manifest.outputs}
        capture(images.astype(np.float32), wanted).save(folder / corner_file(size))
    return tuple(reports)


def corner_images(calibration: CalibrationSet | None, spec: InputSpec) -> FloatArray:
    """Return `CORNER_IMAGES` images of a size: of the calibration set where there is one, else synthetic.

    Files are decoded at that size; arrays, which have the best size, are resized. All are rounded to whole pixel values
    from 0 to 255, so that the reference is a small file.
    """
    plain = spec.as_images()
    if calibration is None:
        images = synthetic_images(plain)[:CORNER_IMAGES]
    elif calibration.arrays is None:
        images = replace(calibration, spec=plain).sample(CORNER_IMAGES)
    else:
        images = _resized(calibration.sample(CORNER_IMAGES), (spec.height, spec.width))
    return normalize(denormalize(images, spec.preprocessing), spec.preprocessing)


def _resized(images: FloatArray, size: Size) -> FloatArray:
    found: FloatArray = F.interpolate(torch.from_numpy(images), size, mode="bilinear", antialias=True).numpy()
    return found
