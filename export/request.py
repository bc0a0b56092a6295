"""What an export is asked for: checked before any work, and the key of what it makes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import deploykit
from deploykit.backbones.base import BaseBackbone
from deploykit.backbones.weights import weights_digest
from deploykit.calibration.images import CalibrationSet
from deploykit.calibration.precision import check_images_given
from deploykit.calibration.recipes import with_recipe
from deploykit.errors import SpecError
from deploykit.export.lowering import LOWERINGS, check_build_options, check_portable, check_target, settled
from deploykit.export.network_digest import network_digest
from deploykit.optional import installed_version, require
from deploykit.runtimes.base import Runtime, load_runtime
from deploykit.spec import DEFAULT_BUILD, Batch, BuildOptions, InputSpec, Int8, Precision

_TOOLS = ("torch", "onnx", "onnx_ir", "onnxscript", "onnxruntime")


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """What to export.

    ``probe_levels``: also compare the levels inside an engine that gives only the head.
    ``embed_preprocessing``: the engine takes uint8 pixels ``(N, H, W, C)`` and normalises them itself.
    ``portable``: the engine is finished on the device that opens it, where the runtime has such a form.
    ``build_options``: what its build is told beside the target, where the runtime has a say in it.
    ``cache``: an INT8 plan that was made before, for whichever runtime, is used again.
    ``time_against_fp32``: an INT8 engine is timed beside FP32 of its runtime; the ratio, which differs from
    run to run, goes into the manifest. ``require_speedup``: it must not be slower.
    ``labels``: the class names that the bundle carries, in the order of the logits.
    ``metric``: the user's own figure of a model, higher is better, for the mixed-precision search.
    """

    backbone: BaseBackbone
    runtime: str
    precision: Precision
    batch: Batch = 1
    calibration: CalibrationSet | None = None
    target: str | None = None
    probe_levels: bool = True
    embed_preprocessing: bool = False
    portable: bool = False
    build_options: BuildOptions = DEFAULT_BUILD
    cache: bool = True
    time_against_fp32: bool = False
    require_speedup: bool = False
    metric: Callable[[Runtime], float] | None = None
    labels: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.runtime in LOWERINGS:  # the torch runtime is refused later, with a message
            object.__setattr__(self, "precision", settled(self.precision, self.runtime, self.target))


def check_request(request: ExportRequest) -> None:
    """Refuse what the runtime cannot make, before any work.

    Raises:
        SpecError: an unknown runtime, one that has no engine, or a precision that it lacks.
        CalibrationError: INT8 without images.
        MissingDependency: the runtime's package is not installed.
    """
    if request.runtime == "torch":
        raise SpecError(
            "the torch runtime is the module itself and has no engine to export. "
            f"Choose a runtime: {', '.join(LOWERINGS)}."
        )
    adapter = load_runtime(request.runtime)
    require(adapter.package)
    check_target(request.runtime, request.target)
    if request.portable:
        check_portable(request.runtime, request.target)
    check_build_options(request.runtime, request.build_options, request.target, portable=request.portable)
    if request.precision.name not in adapter.precisions:
        raise SpecError(
            f"the {request.runtime} runtime has no {request.precision.name}; it has {', '.join(adapter.precisions)}."
        )
    if isinstance(request.precision, Int8) and request.precision.float_dtype not in adapter.int8_float_dtypes:
        raise SpecError(
            f"the {request.runtime} runtime has no int8 with {request.precision.float_dtype} beside it; it has "
            f"{', '.join(adapter.int8_float_dtypes)}. Leave float_dtype out."
        )
    check_images_given(request.precision, request.calibration)
    if isinstance(request.precision, Int8):
        with_recipe(request.precision, request.backbone.family)
    spec = request.backbone.spec
    if request.precision.min_top1_agreement is not None and (spec.features_only or spec.num_classes == 0):
        raise SpecError(
            f"min_top1_agreement needs logits, and this engine gives {', '.join(spec.output_names)}. "
            "Leave it out for features and embeddings."
        )


def cache_parts(request: ExportRequest) -> dict[str, object]:
    """All that decides an engine's bytes, for the key of the engine cache."""
    runtime_package = load_runtime(request.runtime).package
    return {
        "backbone": asdict(request.backbone.spec),
        "weights": weights_digest(request.backbone),
        "network": network_digest(request.backbone, engine_input(request).as_images()),
        "input": asdict(engine_input(request)),
        "runtime": request.runtime,
        "runtime_version": installed_version(runtime_package),
        "precision": [request.precision.name, asdict(request.precision)],
        "batch": request.batch if isinstance(request.batch, int) else asdict(request.batch),
        "calibration": request.calibration.digest if request.calibration is not None else None,
        "target": request.target,
        "labels": request.labels,
        "portable": request.portable,
        "build_options": request.build_options,
        "tools": tool_versions(),
        "deploykit": deploykit.__version__,
    }


def engine_input(request: ExportRequest) -> InputSpec:
    """The input of the engine: the backbone's with the batch asked for, as pixels where it embeds preprocessing."""
    spec = replace(request.backbone.input_spec, batch=request.batch)
    return spec.as_pixels() if request.embed_preprocessing else spec


def tool_versions() -> dict[str, str]:
    """The packages that a master graph depends on, with their versions."""
    return {name: version for name in _TOOLS if (version := installed_version(name))}
