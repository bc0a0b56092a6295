"""All that can be refused before an export begins, and what would be made: nothing is built here."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploykit.backends.table import EVALUATOR, load_backend
from deploykit.bundle import is_bundle
from deploykit.cli.export_options import ExportChoice
from deploykit.errors import SpecError
from deploykit.optional import require
from deploykit.options import ExportOptions
from deploykit.output_places import check_outside_bundles
from deploykit.several_targets import target_folders
from deploykit.spec import BackboneSpec, FeatureLevel, InputSpec
from deploykit.unset import UNSET

if TYPE_CHECKING:
    from deploykit.backbones.base import BackboneOptions, BaseBackbone
    from deploykit.export.job import ExportJob

BUILD_PACKAGES = ("torch", "onnx", "onnx_ir", "onnxscript")
"""What an export needs beside the packages of its runtime and of the one that evaluates graphs."""


@dataclass(frozen=True, kw_only=True)
class ExportPlan:
    """What would be made; ``levels`` are those that parity compares or the engine returns."""

    backbone: BackboneSpec
    weights: str
    input: InputSpec
    outputs: tuple[str, ...]
    levels: tuple[FeatureLevel, ...]
    runtime: str
    runtime_version: str
    precision: str
    settings: dict[str, Any]
    target: str | None
    calibration_images: int
    parameters: int
    output: str


def check_export(choice: ExportChoice, *, decode: bool = False) -> list[ExportPlan]:
    """Check every option of every target, by building the backbone without memory or weights.

    Args:
        choice: what the command line asks for.
        decode: also decode every calibration image, and count those that can be read.

    Raises:
        SpecError, WeightsError, CalibrationError, MissingDependency: what is wrong.
    """
    from deploykit.facade import named_bundle

    several = len(choice.options) > 1
    folders = [*target_folders(choice.output, choice.options).values()] if several else [choice.output]
    for folder in folders:
        check_output(folder, overwrite=choice.overwrite)
    if named_bundle(choice.backbone.name) is not None:
        raise SpecError(
            f"{choice.backbone.name} is a bundle already. Give a backbone's name: `deploykit list` shows them."
        )
    for package in BUILD_PACKAGES:
        require(package)
    load_backend(EVALUATOR).require()
    backbone, weights = _without_memory(choice)
    jobs = [_checked_job(choice, options, backbone) for options in choice.options]
    counts = _decoded(jobs) if decode else [len(job.images or ()) for job in jobs]
    return [_plan(job, weights, folder, count) for job, folder, count in zip(jobs, folders, counts, strict=True)]


def _decoded(jobs: list[ExportJob]) -> list[int]:
    """Return how many calibration images of each job can be read; targets of one input share the reading."""
    counts: dict[InputSpec, int] = {}
    for job in jobs:
        if job.images is not None and job.images.spec not in counts:
            counts[job.images.spec] = sum(1 for _ in job.images.images())
    return [0 if job.images is None else counts[job.images.spec] for job in jobs]


def _plan(job: ExportJob, weights: str, output: Path, images: int) -> ExportPlan:
    backbone = job.backbone
    return ExportPlan(
        backbone=backbone.spec,
        weights=weights,
        input=job.input,
        outputs=backbone.spec.output_names,
        levels=backbone.spec.levels,
        runtime=job.options.runtime,
        runtime_version=job.backend.installed_version() or "unknown",
        precision=job.options.precision.name,
        settings={name: value for name, value in vars(job.options.precision).items() if value is not UNSET},
        target=job.options.target_name,
        calibration_images=images,
        parameters=sum(parameter.numel() for parameter in backbone.parameters()),
        output=str(output),
    )


def check_output(folder: Path, *, overwrite: bool) -> None:
    """Refuse a folder that cannot or must not be written.

    Raises:
        SpecError: it is taken or lies in a bundle, or its parent is not writable.
    """
    check_outside_bundles(folder)
    if folder.exists() and not is_bundle(folder):
        raise SpecError(f"{folder} exists and is not a bundle, so it will not be replaced. Choose another with -o.")
    if folder.exists() and not overwrite:
        raise SpecError(f"{folder} holds a bundle already. Choose another folder with -o, or add --overwrite.")
    parent = next(each for each in folder.absolute().parents if each.exists())
    try:
        with tempfile.TemporaryDirectory(dir=parent, prefix=".deploykit-"):
            pass
    except OSError as error:
        raise SpecError(
            f"{parent} is not a folder that can be written to ({error.strerror}). Choose another place with -o."
        ) from error


def _checked_job(choice: ExportChoice, options: ExportOptions, backbone: BaseBackbone) -> ExportJob:
    from deploykit.calibration.images import calibration_set
    from deploykit.export.job import ExportJob, checked

    job = ExportJob(backbone=backbone, options=options)
    source = calibration_source(choice.calibration)
    if source is not None:
        spec = replace(job.input, batch=1)
        job = replace(job, images=calibration_set(source, spec, skip_corrupt=choice.skip_corrupt))
    return checked(job)


def calibration_source(paths: tuple[str, ...]) -> str | list[str] | None:
    """Return what `export_backbone` takes as ``calibration``."""
    if len(paths) < 2:
        return paths[0] if paths else None
    return list(paths)


def _without_memory(choice: ExportChoice) -> tuple[BaseBackbone, str]:
    """The backbone on torch's meta device, and a word on its weights; a checkpoint file is read, and must fit."""
    from deploykit.backbones.build import build_any
    from deploykit.backbones.image_sizes import set_image_sizes
    from deploykit.backbones.registry import backbone_class, describe, open_options, resolve_name
    from deploykit.backbones.request import make_request
    from deploykit.backbones.weights import default_source, is_path, resolve_source

    given, asked = choice.backbone.name, make_request(**choice.backbone.options)
    is_file = isinstance(asked.pretrained, str) and is_path(asked.pretrained)
    if given.startswith("timm/") or is_file:
        built = build_any(given, asked if is_file else replace(asked, pretrained=False))
        return built, str(asked.pretrained) if asked.pretrained else "random"
    if os.sep in given:
        raise SpecError(f"{given} is a path, and neither a checkpoint file nor there. Check the path.")
    name = resolve_name(given)
    published = default_source(backbone_class(name), name)
    found = resolve_source(name, asked.pretrained, published, logits=asked.gives_logits)
    if found is not None and published is not None and asked.num_classes is UNSET:
        asked = replace(asked, num_classes=published.num_classes if found.has_classifier else 0)
    backbone = shape_of(name, open_options(asked, found.architecture if found is not None else ()))
    if found is not None and found.preprocessing is not None:
        backbone.set_preprocessing(found.preprocessing)
    describe(backbone, asked)
    if asked.image_sizes is not None:
        set_image_sizes(backbone, asked.image_sizes)
    return backbone, "random" if found is None else found.tag


def shape_of(name: str, options: BackboneOptions) -> BaseBackbone:
    """Return a backbone of the registry on torch's meta device: shapes only, no memory, no numbers."""
    import torch

    from deploykit.backbones.registry import build

    with torch.device("meta"):
        return build(name, options)
