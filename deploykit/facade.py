"""The story of deploykit, top to bottom: name a backbone, choose a runtime, call the model."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from deploykit.bundle import Manifest, is_bundle, open_bundle, read_manifest
from deploykit.errors import BundleError, SpecError, nearest
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
    parse_batch,
    parse_image_size,
    parse_precision,
)

if TYPE_CHECKING:
    from torch import nn

    from deploykit.backbones.base import BackboneOptions, BaseBackbone
    from deploykit.calibration.images import CalibrationSource
    from deploykit.export.pipeline import Progress
    from deploykit.export.request import ExportRequest
    from deploykit.runtimes.run_torch import PixelBackbone

Model: TypeAlias = "BaseBackbone | PixelBackbone | Runtime"


def create_backbone(
    name: str | os.PathLike[str] | nn.Module,
    *,
    pretrained: bool | str | os.PathLike[str] = False,
    features_only: bool = False,
    output_indices: tuple[int, ...] | None = None,
    output_stride: int = 32,
    num_classes: int = 1000,
    in_channels: int = 3,
    image_size: int | tuple[int, int] | None = None,
    patch_size: int | None = None,
    hierarchical: bool | str = False,
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
        pretrained: True, a tag of the hub, or a ``.safetensors`` or ``.pth`` file.
        features_only: return feature maps instead of logits.
        output_indices: which levels; index i of a pyramid has stride ``2 ** (i + 1)``. None: all.
        output_stride: 8, 16 or 32, by dilation, for the families that can.
        num_classes: outputs of the classifier; 0 for the embedding.
        in_channels: channels of the images.
        image_size: pixels, an int or (height, width); None: the size of the weights.
        patch_size: another patch for a plain ViT.
        hierarchical: a pyramid of strides 4 to 32 from a plain ViT.
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
    if not _is_module(name) and is_bundle(Path(os.fspath(name))):  # type: ignore[arg-type]
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
    options = _options(
        features_only=features_only,
        output_indices=output_indices,
        output_stride=output_stride,
        num_classes=num_classes,
        in_channels=in_channels,
        image_size=image_size,
        patch_size=patch_size,
        hierarchical=hierarchical,
    )
    backbone = _build(name, options, pretrained)
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
    pretrained: bool | str | os.PathLike[str] = False,
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
        pretrained: as for `create_backbone`.
        overwrite: replace an existing bundle, once the new one is whole.
        skip_corrupt: leave unreadable calibration images out with a warning.
        time_against_fp32: time an INT8 engine beside FP32 of its runtime, and keep the ratio in the manifest,
            which two exports then no longer share byte for byte.
        require_speedup: raise ExportError where an INT8 engine is slower than FP32.
        metric: your own figure of a model, higher is better, as a budget of the mixed-precision search; it may
            fall by ``Int8(max_metric_drop=...)``.
        progress: hears of each stage.
        options: ``features_only``, ``output_indices`` and the other options of `create_backbone`.

    Raises:
        DeployKitError: see `deploykit.errors`; nothing is left at ``output`` then.
    """
    from deploykit.export.pipeline import export

    backbone = _build(name, _options(**options), pretrained)
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


def _is_module(name: object) -> bool:
    return hasattr(name, "state_dict")


def _options(*, image_size: int | tuple[int, int] | None = None, **options: Any) -> BackboneOptions:
    from deploykit.backbones.base import BackboneOptions

    size = None if image_size is None else parse_image_size(image_size)
    try:
        return BackboneOptions(image_size=size, **options)
    except TypeError as error:
        raise SpecError(f"{error}. See create_backbone for the options.") from error


def _build(name: Any, options: BackboneOptions, pretrained: Any) -> BaseBackbone:
    """A name, a ``timm/`` name or a module, as a backbone with its weights."""
    from deploykit.backbones.base import BackboneOptions, BaseBackbone
    from deploykit.backbones.registry import build_backbone

    if hasattr(name, "input_spec") and name.input_spec.embeds_preprocessing:
        raise SpecError(
            f"{name!r} embeds its preprocessing already; expected the backbone inside it. "
            "Give model.backbone, and embed_preprocessing=True."
        )
    if isinstance(name, BaseBackbone):
        if pretrained or options not in (BackboneOptions(), name.options):
            raise SpecError(
                f"{name.name} is a backbone already, built with {name.options}; expected no pretrained and no options "
                "beside it. Give its name to build another."
            )
        return name
    if _is_module(name):
        return _wrap(name, options, pretrained)
    text = os.fspath(name)
    if text.startswith("timm/"):
        from deploykit.backbones.timm_models import build_timm

        return build_timm(text, options, pretrained)
    if os.sep in text or Path(text).exists():
        raise BundleError(
            f"{text}: a path, but not a bundle (no manifest.json in it). Export one with deploykit export."
        )
    return build_backbone(text, options, pretrained)


def _wrap(module: nn.Module, options: BackboneOptions, pretrained: Any) -> BaseBackbone:
    """A user's own module, which decides everything but the size, the channels and the levels returned."""
    from deploykit.backbones.base import BackboneOptions
    from deploykit.backbones.user_module import wrap_module

    taken = BackboneOptions(
        image_size=options.image_size,
        in_channels=options.in_channels,
        output_indices=options.output_indices,
        features_only=options.features_only,
    )
    if pretrained or options != taken:
        raise SpecError(
            "a module of your own comes with its weights and its head; expected image_size, in_channels and "
            "output_indices beside it, and no other option."
        )
    return wrap_module(
        module,
        image_size=options.image_size or (224, 224),
        in_channels=options.in_channels,
        output_indices=options.output_indices,
    )


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
    )
    check_request(request)
    return request


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
