"""The story of deploykit, top to bottom: name a backbone, choose a runtime, call the model."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from deploykit.backbones.request import is_module, make_request
from deploykit.bundle import Manifest, is_bundle, open_bundle, read_manifest
from deploykit.errors import SpecError, WeightsWarning, nearest
from deploykit.labels import LabelSource, folder_labels
from deploykit.parity.compare import compare
from deploykit.parity.record import record_status
from deploykit.parity.reference import ParityReference
from deploykit.parity.report import ParityReport
from deploykit.runtimes.base import RUNTIMES, Runtime, load_runtime, run_in_batches
from deploykit.spec import (
    DEFAULT_BUILD,
    BatchRange,
    BuildOptions,
    Precision,
    Preprocessing,
    parse_batch,
    parse_precision,
)
from deploykit.unset import UNSET, Unset

if TYPE_CHECKING:
    from torch import nn

    from deploykit.backbones.base import BaseBackbone
    from deploykit.calibration.images import CalibrationSet, CalibrationSource
    from deploykit.export.pipeline import Progress
    from deploykit.export.request import ExportRequest
    from deploykit.runtimes.run_torch import PixelBackbone

Model: TypeAlias = "BaseBackbone | PixelBackbone | Runtime"


def create_backbone(
    name: str | os.PathLike[str] | nn.Module,
    *,
    pretrained: bool | str | os.PathLike[str] = False,
    checkpoint_key: str | None = None,
    new_head: bool = False,
    features_only: bool | Unset = UNSET,
    output_indices: Sequence[int] | None = None,
    output_stride: int = 32,
    num_classes: int | Unset = UNSET,
    in_channels: int | Unset = UNSET,
    image_size: int | tuple[int, int] | None = None,
    patch_size: int | None = None,
    hierarchical: bool | str = False,
    labels: LabelSource | None = None,
    preprocessing: Preprocessing | Mapping[str, Any] | None = None,
    runtime: str = "torch",
    precision: str | Precision = "fp32",
    calibration: CalibrationSource | None = None,
    batch_size: int | str | tuple[int, int, int] | BatchRange = 1,
    embed_preprocessing: bool = False,
    device: str = "auto",
    target: str | None = None,
    cache: bool = True,
) -> Model:
    """A backbone in a runtime, called the same way whatever the runtime.

    ``model(images)`` takes ``(N, C, H, W)`` float32, normalised as ``model.input_spec`` says (or
    ``(N, H, W, C)`` uint8 with ``embed_preprocessing``), and returns a dict of feature maps by level
    (``features_only``), ``(N, num_classes)`` logits, or the ``(N, D)`` embedding (``num_classes=0``).

    Args:
        name: a variant, an alias, ``"timm/<name>"``, a module, or the folder of a bundle.
        pretrained: True, a tag of the hub, or a checkpoint file of your own.
        checkpoint_key: which of several state dicts in the file, such as ``"state_dict_ema"``.
        new_head: draw a new classifier for ``num_classes``, in place of that of the weights.
        features_only: return feature maps instead of logits; ``hierarchical`` implies it.
        output_indices: which levels; index i of a pyramid has stride ``2 ** (i + 1)``. None: all.
        output_stride: 8, 16 or 32, by dilation, for the families that can.
        num_classes: outputs of the classifier, 0 for the embedding; not given: those of the weights, else 1000.
        in_channels: channels of the images; not given: those of the weights, else 3.
        image_size: pixels, an int or (height, width); None: the size of the weights.
        patch_size: another patch for a plain ViT.
        hierarchical: a pyramid of strides 4 to 32 from a plain ViT.
        labels: the class names, in the order of the classes: a list, a mapping or a file; None: those of the weights.
        preprocessing: how images were prepared in training, or a dict of some of its fields; None: as the
            weights say.
        runtime: ``torch``, ``torch_compile``, ``onnxruntime``, ``openvino`` or ``tensorrt``.
        precision: ``fp32``, ``fp16``, ``bf16``, ``int8``, or its dataclass with settings.
        calibration: the images for INT8: a folder, files, an array, an iterable of batches.
        batch_size: an int, ``"dynamic"``, (min, opt, max) or a `BatchRange`.
        embed_preprocessing: the model takes decoded RGB pixels, uint8 ``(N, H, W, C)`` of its size,
            and does the cast, the transpose and the mean and std itself.
        device: where it runs; ``"auto"`` is the runtime's first device.
        target: what an engine is built for, where the runtime has targets (``"sm89"``, ``"x86-avx2"``).
        cache: keep built engines and INT8 plans, keyed by all that decides them.

    Raises:
        DeployKitError: see `deploykit.errors` for the tree; every message says what to do.
    """
    if not is_module(name) and is_bundle(Path(os.fspath(name))):  # type: ignore[arg-type]
        return _open_asked(
            Path(os.fspath(name)),  # type: ignore[arg-type]
            runtime=runtime,
            precision=precision,
            embed_preprocessing=embed_preprocessing,
            device=device,
        )
    if runtime != "torch" and runtime not in RUNTIMES:
        raise SpecError(f"unknown runtime {runtime!r}. {nearest(runtime, ['torch', *RUNTIMES])}")
    chosen, batch = parse_precision(precision), parse_batch(batch_size)
    asked = make_request(
        pretrained=pretrained,
        checkpoint_key=checkpoint_key,
        new_head=new_head,
        features_only=features_only,
        output_indices=output_indices,
        output_stride=output_stride,
        num_classes=num_classes,
        in_channels=in_channels,
        image_size=image_size,
        patch_size=patch_size,
        hierarchical=hierarchical,
        labels=labels,
        preprocessing=preprocessing,
    )
    from deploykit.backbones.build import build_any

    backbone = build_any(name, asked)
    if runtime == "torch":
        return _in_torch(backbone, chosen, device, embed_preprocessing=embed_preprocessing)
    request = _request(
        backbone,
        runtime=runtime,
        precision=chosen,
        batch=batch,
        calibration=calibration,
        target=target,
        embed_preprocessing=embed_preprocessing,
        probe_levels=False,
        cache=cache,
    )
    return _open_built(request, device=device, cache=cache)


def export_backbone(
    name: str | nn.Module,
    output: str | os.PathLike[str],
    *,
    runtime: str,
    precision: str | Precision = "fp32",
    calibration: CalibrationSource | None = None,
    batch_size: int | str | tuple[int, int, int] | BatchRange = 1,
    embed_preprocessing: bool = False,
    target: str | None = None,
    portable: bool = False,
    build_options: BuildOptions = DEFAULT_BUILD,
    overwrite: bool = False,
    skip_corrupt: bool = False,
    time_against_fp32: bool = False,
    require_speedup: bool = False,
    metric: Callable[[Runtime], float] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Manifest:
    """Write a backbone as a bundle that `load_bundle` and ``deploykit verify`` open without torch.

    Args:
        name: as for `create_backbone`, without bundles.
        output: the folder to write; taken only when it is a bundle and ``overwrite`` is on.
        runtime: the engine's runtime.
        precision: as for `create_backbone`.
        calibration: as for `create_backbone`.
        batch_size: as for `create_backbone`.
        embed_preprocessing: as for `create_backbone`.
        target: as for `create_backbone`.
        portable: let the device that opens the bundle build its own engine, where the runtime has that form.
        build_options: GPUs and versions beside the target's that are to open a TensorRT plan, and a timing cache.
        overwrite: replace an existing bundle, once the new one is whole.
        skip_corrupt: leave unreadable calibration images out with a warning.
        time_against_fp32: time an INT8 engine beside FP32 of its runtime, and keep the ratio in the manifest,
            which two exports then no longer share byte for byte.
        require_speedup: raise ExportError where an INT8 engine is slower than FP32.
        metric: your own figure of a model, higher is better, as a budget of the mixed-precision search; it may
            fall by ``Int8(max_metric_drop=...)``.
        progress: hears of each stage.
        options: ``pretrained``, ``num_classes``, ``labels`` and the other options of `create_backbone` that say which
            backbone it is. Without ``labels``, a calibration folder with one subfolder a class gives the names.

    Raises:
        DeployKitError: see `deploykit.errors`; nothing is left at ``output`` then.
    """
    from deploykit.backbones.build import build_any
    from deploykit.export.pipeline import export

    backbone = build_any(name, make_request(**options))
    request = _request(
        backbone,
        runtime=runtime,
        precision=parse_precision(precision),
        batch=parse_batch(batch_size),
        calibration=calibration,
        target=target,
        embed_preprocessing=embed_preprocessing,
        portable=portable,
        build_options=build_options,
        probe_levels=True,
        skip_corrupt=skip_corrupt,
    )
    request = replace(request, time_against_fp32=time_against_fp32, require_speedup=require_speedup, metric=metric)
    return export(request, Path(output), overwrite=overwrite, progress=progress)


def load_bundle(folder: str | os.PathLike[str], *, device: str = "auto") -> Runtime:
    """Verify a bundle and open its engine; needs the runtime's package and NumPy, not torch.

    Raises:
        BundleError: not a bundle, or one that is damaged, incomplete or from a newer schema.
        MissingDependency: the runtime's package is not installed.
        IncompatibleEngine, DeviceUnavailable: the engine cannot run here.
    """
    path = Path(folder)
    manifest = open_bundle(path)
    return load_runtime(manifest.runtime)(manifest, path, device=device)


def verify_bundle(folder: str | os.PathLike[str], *, device: str = "auto", record: bool = False) -> ParityReport:
    """Run a bundle's engine on the reference images that it carries and compare with torch's outputs.

    Needs no torch and no weights. The report's ``passed`` says whether every output is within the
    budget that the engine was exported with; ``raise_for_failures()`` makes it an error.

    ``record`` writes what was seen here into the bundle: ``parity_checked`` where every output is within the
    budget and else ``executed``, with the machine, the device and the versions. That is for a bundle that was
    built on a machine without its device.

    Raises:
        BundleError: not a bundle, or one that is damaged, or one that cannot be written.
        IncompatibleEngine, DeviceUnavailable: the engine cannot run here.
    """
    path = Path(folder)
    with load_bundle(path, device=device) as model:
        seen_on = model.seen_on()
        reference = ParityReference.load(path / "reference.npz")
        images = reference.images.astype(model.input_spec.dtype, copy=False)
        found = reference.sample(run_in_batches(model, images))
        levels = compare(
            reference.expected,
            found,
            min_sqnr_db=model.precision.min_sqnr_db,
            min_top1_agreement=model.precision.min_top1_agreement,
            logits=reference.logits,
        )
        report = ParityReport(
            runtime=model.runtime,
            runtime_version=model.manifest.runtime_version,
            precision=model.precision.name,
            images=len(reference),
            min_sqnr_db=model.precision.min_sqnr_db,
            min_top1_agreement=model.precision.min_top1_agreement,
            levels=levels,
        )
    if record:
        record_status(path, "parity_checked" if report.passed else "executed", seen_on)
    return report


def _open_asked(
    folder: Path, *, runtime: str, precision: str | Precision, embed_preprocessing: bool, device: str
) -> Runtime:
    """A bundle, when it has the runtime, precision and input asked for; their defaults ask for nothing."""
    manifest = read_manifest(folder)
    if embed_preprocessing and not manifest.input.embeds_preprocessing:
        raise SpecError(
            f"{folder} holds an engine of normalised float32 images, and embed_preprocessing was asked for. "
            "Leave it out, or export the bundle again with it."
        )
    asked = (
        ("runtime", runtime, "torch", manifest.runtime),
        ("precision", parse_precision(precision).name, "fp32", manifest.precision),
    )
    for what, wanted, default, has in asked:
        if wanted not in (default, has):
            raise SpecError(f"{folder} holds an engine of {what} {has!r}, not {wanted!r}. Leave {what} out.")
    return load_bundle(folder, device=device)


def _in_torch(
    backbone: BaseBackbone, precision: Precision, device: str, *, embed_preprocessing: bool
) -> BaseBackbone | PixelBackbone:
    """The module itself, in a dtype and on a device, behind its preprocessing where that is asked for."""
    from deploykit.runtimes.run_torch import PixelBackbone, place_module

    placed = place_module(backbone, precision, device)
    return PixelBackbone(placed) if embed_preprocessing else placed


def _request(
    backbone: BaseBackbone,
    *,
    runtime: str,
    precision: Precision,
    batch: Any,
    calibration: CalibrationSource | None,
    target: str | None,
    embed_preprocessing: bool,
    probe_levels: bool,
    portable: bool = False,
    build_options: BuildOptions = DEFAULT_BUILD,
    skip_corrupt: bool = False,
    cache: bool = True,
) -> ExportRequest:
    from deploykit.calibration.images import calibration_set
    from deploykit.export.request import ExportRequest, check_request

    _warn_of_guess(backbone)
    images = None
    if calibration is not None:
        spec = backbone.input_spec.as_pixels() if embed_preprocessing else backbone.input_spec
        images = calibration_set(calibration, spec, skip_corrupt=skip_corrupt)
    request = ExportRequest(
        backbone=backbone,
        runtime=runtime,
        precision=precision,
        batch=batch,
        calibration=images,
        target=target,
        embed_preprocessing=embed_preprocessing,
        probe_levels=probe_levels,
        portable=portable,
        build_options=build_options,
        cache=cache,
        labels=_labels(backbone, calibration, images),
    )
    check_request(request)
    return request


def _labels(
    backbone: BaseBackbone, calibration: CalibrationSource | None, images: CalibrationSet | None
) -> tuple[str, ...] | None:
    """The class names of a backbone; else those of the class folders that it is calibrated with."""
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


def _open_built(request: ExportRequest, *, device: str, cache: bool) -> Runtime:
    """The engine of a request: from the cache, built into it, or built for this model alone."""
    from deploykit.cache import EngineCache
    from deploykit.export.pipeline import export
    from deploykit.export.request import cache_parts

    def build(folder: Path) -> None:
        export(request, folder)

    if cache:
        engines = EngineCache()
        return load_bundle(engines.get_or_build(engines.key(cache_parts(request)), build), device=device)
    scratch = Path(tempfile.mkdtemp(prefix="deploykit-engine-"))
    try:
        build(scratch / "bundle")
        model = load_bundle(scratch / "bundle", device=device)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    weakref.finalize(model, shutil.rmtree, scratch, ignore_errors=True)
    return model
