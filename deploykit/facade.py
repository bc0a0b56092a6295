"""The story of deploykit, top to bottom: name a backbone, choose a runtime, call the model."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from deploykit.arguments import check_arguments
from deploykit.asked import check_asked
from deploykit.backbones.request import is_module, make_request
from deploykit.backends.backend import resolve
from deploykit.backends.runtime import Runtime
from deploykit.backends.table import load_backend
from deploykit.bundle import is_bundle
from deploykit.errors import SpecError
from deploykit.export.target_options import export_options
from deploykit.jobs import make_job
from deploykit.labels import LabelSource
from deploykit.loading import load_bundle
from deploykit.names import TIMM, is_bare, path_of
from deploykit.optional import require
from deploykit.options import ExportOptions
from deploykit.progress import Progress, quiet
from deploykit.qat import check_alone, is_qat, qat_inside, trained_job
from deploykit.spec import (
    DEFAULT_BUILD,
    BatchRange,
    BuildOptions,
    Precision,
    Preprocessing,
    Size,
    SizeRange,
    parse_batch,
)
from deploykit.threads import Hint, check_threads, checked_hint
from deploykit.unset import UNSET, UnsetType, given

if TYPE_CHECKING:
    from torch import nn

    from deploykit.backbones.base import BaseBackbone
    from deploykit.backends.torch.adapter import PixelBackbone
    from deploykit.calibration.images import CalibrationSource
    from deploykit.export.pipeline import ExportResult

Model: TypeAlias = "BaseBackbone | PixelBackbone | Runtime"
ImageSize: TypeAlias = int | tuple[int, int] | tuple[int | Size, int | Size, int | Size] | SizeRange
BatchSize: TypeAlias = int | str | tuple[int, int, int] | BatchRange


def create_backbone(
    name: str | os.PathLike[str] | nn.Module,
    *,
    pretrained: bool | str | os.PathLike[str] = False,
    checkpoint_key: str | None = None,
    new_head: bool = False,
    features_only: bool | UnsetType = UNSET,
    output_indices: Sequence[int] | UnsetType | None = UNSET,
    output_stride: int | UnsetType = UNSET,
    num_classes: int | UnsetType = UNSET,
    in_channels: int | UnsetType = UNSET,
    image_size: ImageSize | UnsetType | None = UNSET,
    patch_size: int | UnsetType | None = UNSET,
    hierarchical: bool | str | UnsetType = UNSET,
    labels: LabelSource | None = None,
    preprocessing: Preprocessing | Mapping[str, Any] | None = None,
    runtime: str | UnsetType = UNSET,
    precision: str | Precision | UnsetType = UNSET,
    calibration: CalibrationSource | None = None,
    batch_size: BatchSize | UnsetType = UNSET,
    embed_preprocessing: bool | UnsetType = UNSET,
    device: str = "auto",
    target: str | UnsetType | None = UNSET,
    cache: bool = True,
    threads: int | None = None,
    hint: Hint = "latency",
    trust: bool | None = None,
    signed_by: str | os.PathLike[str] | None = None,
) -> Model:
    """Make a backbone in a runtime, called the same way whatever the runtime.

    ``model(images)`` takes ``(N, C, H, W)`` float32, normalised as ``model.input_spec`` says (or
    ``(N, H, W, C)`` uint8 with ``embed_preprocessing``), and returns a dict of feature maps by level
    (``features_only``), ``(N, num_classes)`` logits, or the ``(N, D)`` embedding (``num_classes=0``).

    Beside a bundle every option that is given must be what the bundle holds.

    Args:
        name: a variant, an alias, ``"timm/<name>"``, a module, or the path of a bundle.
        pretrained: True, a tag of the hub, or a checkpoint file of your own.
        checkpoint_key: which of several state dicts in the file, such as ``"state_dict_ema"``.
        new_head: draw a new classifier for ``num_classes``, in place of that of the weights.
        features_only: return feature maps instead of logits; ``hierarchical`` implies it.
        output_indices: which levels; index i of a pyramid has stride ``2 ** (i + 1)``. None: all.
        output_stride: 8, 16 or 32, by dilation, for the families that can; 32 when not given.
        num_classes: outputs of the classifier, 0 for the embedding; not given: those of the weights, else 1000.
        in_channels: channels of the images; not given: those of the weights, else 3.
        image_size: pixels, an int or (height, width); None: the size of the weights. A range, (min, opt, max) or a
            `SizeRange`, where the network and the runtime take one.
        patch_size: another patch for a plain ViT.
        hierarchical: a pyramid of strides 4 to 32 from a plain ViT.
        labels: the class names, in the order of the classes: a list, a mapping or a file; None: those of the weights.
        preprocessing: how images were prepared in training, or a dict of some of its fields; None: as the
            weights say.
        runtime: ``torch``, ``torch_compile``, ``onnxruntime``, ``openvino``, ``tensorrt``, or one that another package
            adds; ``torch`` when not given.
        precision: ``fp32``, ``fp16``, ``bf16``, ``int8``, or its dataclass with settings; ``fp32`` when not given.
        calibration: the images for INT8: a folder, files, an array, an iterable of batches.
        batch_size: an int, ``"dynamic"``, (min, opt, max) or a `BatchRange`; 1 when not given.
        embed_preprocessing: the model takes decoded RGB pixels, uint8 ``(N, H, W, C)`` of its size,
            and does the cast, the transpose and the mean and std itself.
        device: where it runs; ``"auto"`` is the runtime's first device.
        target: what an engine is for: a device that ``deploykit targets`` lists, or a TOML file that describes one,
            which decides all that is not given; or one of the runtime's own (``"sm89"``, ``"x86-avx2"``).
        cache: keep built engines and INT8 plans, keyed by all that decides them.
        threads: how many threads compute; None: as many as the process may use (its affinity mask, its cgroup's quota,
            ``OMP_NUM_THREADS``). The ``torch`` runtime has one number for the whole process.
        hint: ``"latency"``, one call at a time in all threads; or ``"throughput"``, several calls at a time, from
            `model.stream()` or several threads, that share them. The ``torch`` runtime has no such choice.
        trust: of a bundle whose engine is machine code (torch_compile, a TensorRT plan) and was not made by this user
            on this machine: True opens it, False refuses it; None opens it with a warning.
        signed_by: of a bundle: the public key (PEM) of who must have signed it with ``deploykit sign``, or the
            certificate of an authority; such an engine is trusted.

    Raises:
        DeployKitError: see `deploykit.errors` for the tree; every message says what to do.
    """
    check_arguments(create_backbone, locals())
    shape: dict[str, Any] = {
        "features_only": features_only,
        "output_indices": output_indices,
        "output_stride": output_stride,
        "num_classes": num_classes,
        "in_channels": in_channels,
        "image_size": image_size,
        "patch_size": patch_size,
        "hierarchical": hierarchical,
    }
    engine: dict[str, Any] = {
        "runtime": runtime,
        "precision": precision,
        "batch_size": batch_size,
        "embed_preprocessing": embed_preprocessing,
        "target": target,
    }
    bundle = named_bundle(name)
    if bundle is not None:
        check_asked(
            bundle,
            shape | engine,
            refused={
                "pretrained": bool(pretrained),
                "checkpoint_key": checkpoint_key is not None,
                "new_head": new_head,
                "labels": labels is not None,
                "preprocessing": preprocessing is not None,
                "calibration": calibration is not None,
            },
        )
        return load_bundle(bundle, device=device, threads=threads, hint=hint, trust=trust, signed_by=signed_by)
    if signed_by is not None:
        raise SpecError(f"signed_by is for a bundle, and {name!r} is none. Fix: give the path of a bundle.")
    named = given(target, None)
    options = export_options(
        named,
        runtime="torch" if runtime is UNSET and named is None else runtime,
        precision=precision,
        batch=UNSET if batch_size is UNSET else parse_batch(batch_size),
        embed_preprocessing=embed_preprocessing,
        probe_levels=False,
        cache=cache,
    )
    backend = load_backend(options.runtime)
    asked = make_request(
        pretrained=pretrained,
        checkpoint_key=checkpoint_key,
        new_head=new_head,
        labels=labels,
        preprocessing=preprocessing,
        **{option: value for option, value in shape.items() if value is not UNSET},
    )
    require("torch")
    from deploykit.backbones.build import build_any

    backbone = build_any(name, asked)
    if backend.place is not None:
        if checked_hint(hint) != "latency":
            raise SpecError(f"hint is {hint!r}, and the {backend.name} runtime has no such choice. Leave it out.")
        placed: Model = resolve(backend.place)(
            backbone,
            options.precision,
            device,
            embed_preprocessing=options.embed_preprocessing,
            threads=check_threads(threads),
        )
        return placed
    from deploykit.opening import open_built

    job = make_job(backbone, options, calibration)
    return open_built(job, device=device, threads=check_threads(threads), hint=hint)


def export_backbone(
    name: str | nn.Module,
    output: str | os.PathLike[str],
    *,
    runtime: str | UnsetType = UNSET,
    precision: str | Precision | UnsetType = UNSET,
    calibration: CalibrationSource | None = None,
    batch_size: BatchSize | UnsetType = UNSET,
    embed_preprocessing: bool | UnsetType = UNSET,
    target: str | None = None,
    portable: bool | UnsetType = UNSET,
    build_options: BuildOptions = DEFAULT_BUILD,
    overwrite: bool = False,
    skip_corrupt: bool = False,
    time_against_fp32: bool = False,
    require_speedup: bool = False,
    metric: Callable[[Runtime], float] | None = None,
    ray: bool = False,
    workers: int | None = None,
    progress: Progress = quiet,
    **options: Any,
) -> ExportResult:
    """Write a backbone as a bundle that `load_bundle` and ``deploykit verify`` open without torch.

    Args:
        name: as for `create_backbone`, without bundles; or what `prepare_qat` gave, trained, which has its calibration
            and its options.
        output: the folder to write; taken only when it is a bundle and ``overwrite`` is on.
        runtime: the engine's runtime; not given: the target's.
        precision: as for `create_backbone`.
        calibration: as for `create_backbone`.
        batch_size: as for `create_backbone`.
        embed_preprocessing: as for `create_backbone`.
        target: as for `create_backbone`.
        portable: let the device that opens the bundle build its own engine, where the runtime has that form.
        build_options: devices and versions beside the target's that are to open the engine, and a timing cache.
        overwrite: replace an existing bundle, once the new one is whole.
        skip_corrupt: leave unreadable calibration images out with a warning.
        time_against_fp32: time an INT8 engine beside FP32 of its runtime, and keep the ratio in the manifest,
            which two exports then no longer share byte for byte.
        require_speedup: raise ExportError where an INT8 engine is slower than FP32.
        metric: your own figure of a model, higher is better, as a budget of the mixed-precision search; it may
            fall by ``Int8(max_metric_drop=...)``.
        ray: count the calibration's statistics in processes of a Ray cluster (``RAY_ADDRESS``, else of this machine);
            the plan is that of one process, bit by bit.
        workers: how many of them; None: one for each processor of the cluster.
        progress: called with each `deploykit.progress.ProgressEvent`.
        options: ``pretrained``, ``num_classes``, ``labels`` and the other options of `create_backbone` that say which
            backbone it is. Without ``labels``, a calibration folder with one subfolder a class gives the names.

    Returns:
        The manifest, the parity report, and what was timed, searched and tried.

    Raises:
        DeployKitError: see `deploykit.errors`; nothing is left at ``output`` then.
    """
    check_arguments(export_backbone, locals())
    name = qat_inside(name)
    if is_qat(name):
        precision = "int8" if precision is UNSET else precision
        runtime = name.source.runtime or UNSET if runtime is UNSET and target is None else runtime
    asked = export_options(
        target,
        runtime=runtime,
        precision=precision,
        batch=UNSET if batch_size is UNSET else parse_batch(batch_size),
        embed_preprocessing=embed_preprocessing,
        portable=portable,
        build=build_options,
        time_against_fp32=time_against_fp32,
        require_speedup=require_speedup,
        metric=metric,
        ray=ray,
        workers=workers,
    )
    return export_asked(
        name,
        Path(output),
        asked,
        backbone=options,
        calibration=calibration,
        skip_corrupt=skip_corrupt,
        overwrite=overwrite,
        progress=progress,
    )


def export_asked(
    name: str | nn.Module,
    output: Path,
    asked: ExportOptions,
    *,
    backbone: Mapping[str, Any],
    calibration: CalibrationSource | None = None,
    skip_corrupt: bool = False,
    overwrite: bool = False,
    progress: Progress = quiet,
) -> ExportResult:
    """Export what both doors ask for, `export_backbone` and the command line.

    Args:
        name: as for `create_backbone`, without bundles.
        output: the folder to write.
        asked: the engine.
        backbone: the options of `create_backbone` that say which backbone it is.
        calibration: as for `create_backbone`.
        skip_corrupt: leave unreadable calibration images out with a warning.
        overwrite: replace an existing bundle, once the new one is whole.
        progress: called with each event.
    """
    require("torch")
    from deploykit.backbones.build import build_any
    from deploykit.export.pipeline import export

    load_backend(asked.runtime)
    if is_qat(name):
        check_alone(backbone, calibration)
        job = trained_job(name, asked)
    else:
        built = build_any(name, make_request(**backbone))
        job = make_job(built, asked, calibration, skip_corrupt=skip_corrupt)
    return export(job, output, overwrite=overwrite, progress=progress)


def named_bundle(name: Any) -> Path | None:
    """Return the folder of a bundle that a name stands for; None: it names a backbone, or is a module.

    The name of a variant, an alias or ``timm/<name>`` is that, whatever lies in the working directory: a path to a
    folder of the same name is written ``./<name>``, or given as a `Path`.
    """
    if is_module(name):
        return None
    path = path_of(name)
    if isinstance(name, str) and (name.startswith(TIMM) or (is_bare(name) and _is_backbone_name(name))):
        return None
    return path if is_bundle(path) else None


def _is_backbone_name(text: str) -> bool:
    """Return whether a bare name is a variant's or an alias; on a device without torch it can only be a bundle's."""
    if importlib.util.find_spec("torch") is None:
        return False
    from deploykit.backbones.registry import is_known

    return is_known(text)
