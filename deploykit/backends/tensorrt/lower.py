"""ONNX graph -> TensorRT plan, built in a subprocess on any x86-64 machine, GPU or not; or a portable one."""

from __future__ import annotations

import tempfile
from pathlib import Path

import msgspec

from deploykit.backends.backend import Engine, LowerOptions
from deploykit.backends.onnx_file import write_onnx
from deploykit.backends.tensorrt import api
from deploykit.backends.tensorrt.build import (
    BUILD_SECONDS,
    SETTINGS_FILE,
    BuildSettings,
    build_plan,
    parse_model,
    requirements,
)
from deploykit.backends.tensorrt.legalize import prepare, quantize_layers
from deploykit.backends.tensorrt.targets import DEVICES, TARGETS
from deploykit.errors import ExportError, nearest
from deploykit.graph import OnnxGraph
from deploykit.optional import installed_version
from deploykit.spec import BuildOptions, InputSpec

DEFAULT_CAPABILITY = "sm86"


def lower(graph: OnnxGraph, folder: Path, options: LowerOptions, *, time_limit: float = BUILD_SECONDS) -> Engine:
    """Build ``model.plan`` for one compute capability, strongly typed, without TF32.

    Args:
        graph: its ONNX model's Q/DQ nodes, if any, are in a form that `tensorrt_linter.prepare` takes.
        folder: where the plan goes; nothing is left there when the build fails.
        options: its target is the GPU's compute capability or name, one of `TARGETS`; None: `DEFAULT_CAPABILITY` for
            TensorRT-RTX, and the GPU of this machine for full TensorRT, which builds for no other. Its build options
            name other GPUs and versions that are to open the plan, and a timing cache.
        time_limit: in seconds.

    Raises:
        SpecError: an option that this TensorRT does not do.
        ExportError: an unknown target, Q/DQ nodes or operators that TensorRT refuses or reads
            wrongly, or a build that failed, crashed or took too long; with the end of its log.
    """
    flavour = api.default_flavour()
    api.load_tensorrt(flavour)
    build = options.build
    api.check_build_options(build, options.target, flavour)
    capability = _capability(flavour, options.target, build)
    model = prepare(graph.model)
    settings = BuildSettings(
        flavour=flavour,
        input=graph.input.name,
        capability=capability,
        profile=_profile(graph.input),
        quantize_layers=quantize_layers(model),
        hardware_compatibility=build.hardware_compatibility,
        version_compatible=build.version_compatible,
    )
    cache = Path(build.timing_cache) if build.timing_cache is not None else None
    with tempfile.TemporaryDirectory(prefix=".onnx-", dir=folder) as staging:
        file = Path(staging) / "model.onnx"
        write_onnx(model, file)
        plan = folder / "model.plan"
        build_plan(file, plan, settings, time_limit=time_limit, progress=options.on_step, timing_cache=cache)
    version = api.flavour_version(flavour)
    return Engine(
        file="model.plan",
        runtime_version=version,
        requires=requirements(settings) | ({"timing_cache": "on"} if cache is not None else {}),
        tools={"onnx": installed_version("onnx") or "unknown", flavour: version},
    )


def lower_portable(graph: OnnxGraph, folder: Path, options: LowerOptions) -> Engine:
    """Write ``model.onnx``, as TensorRT reads it, with the settings of the build that the device will do.

    The parser here reads it, so that what TensorRT refuses is told now. The device that opens the bundle
    first builds the plan, for its own GPU and version.

    Raises:
        ExportError: a target, or Q/DQ nodes or operators that TensorRT refuses.
    """
    if options.target is not None:
        raise ExportError(
            f"a portable engine is built for the GPU that opens it, and {options.target!r} was given: leave it out."
        )
    model = prepare(graph.model)
    settings = BuildSettings(
        flavour=api.default_flavour(),
        input=graph.input.name,
        profile=_profile(graph.input),
        quantize_layers=quantize_layers(model),
    )
    file = folder / "model.onnx"
    write_onnx(model, file)
    try:
        parse_model(file, settings)
    except ExportError:
        file.unlink()
        file.with_name(f"{file.name}.data").unlink(missing_ok=True)
        raise
    (folder / SETTINGS_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(settings), indent=1) + b"\n")
    return Engine(
        file="model.onnx",
        runtime_version="any",
        requires={"tf32": "on" if settings.tf32 else "off"},
        tools={"onnx": installed_version("onnx") or "unknown"},
    )


def _capability(flavour: str, target: str | None, options: BuildOptions) -> str | None:
    """Return what to build for; None is every GPU since Ampere, which TensorRT-RTX builds for when it is told none."""
    capability = None if target is None else _known(target)
    if flavour != api.RTX:
        return _of_this_gpu(capability)
    if capability is None:
        return None if options.hardware_compatibility == "ampere_plus" else DEFAULT_CAPABILITY
    if capability not in api.RTX_CAPABILITIES:
        raise ExportError(
            f"TensorRT-RTX builds for {', '.join(api.RTX_CAPABILITIES)}, and {target!r} is {capability}. Export with "
            "portable=True (--portable): the device then builds its own plan with the TensorRT that it has."
        )
    return capability


def _known(target: str) -> str:
    """Return the compute capability of a target's name."""
    if target not in TARGETS:
        raise ExportError(f"unknown TensorRT target {target!r}. {nearest(target, TARGETS)}")
    return DEVICES.get(target, target)


def _of_this_gpu(capability: str | None) -> str:
    """Full TensorRT's target: the GPU here, which must be the one asked for.

    Raises:
        ExportError: no GPU here, or another one.
    """
    from deploykit.backends.tensorrt.cuda_driver import cuda_capabilities

    here = cuda_capabilities()
    if not here:
        raise ExportError(
            "full TensorRT builds only on a machine with a GPU, and there is none here. Install tensorrt_rtx, which "
            "builds anywhere, or export with portable=True (--portable) and let the device build its plan."
        )
    if capability not in (None, here[0]):
        raise ExportError(
            f"full TensorRT builds for the GPU of this machine, {here[0]}, and {capability} was asked for. Export "
            "there, or with portable=True (--portable)."
        )
    return here[0]


def _profile(spec: InputSpec) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None:
    """Return the min, opt and max shape of a dynamic batch or a range of sizes; None where all is fixed."""
    batch, sizes = spec.batch, spec.sizes
    if isinstance(batch, int) and sizes is None:
        return None
    batches = (batch, batch, batch) if isinstance(batch, int) else (batch.min, batch.opt, batch.max)
    one = (spec.height, spec.width)
    size_of_each = (one, one, one) if sizes is None else tuple(zip(*sizes.sides, strict=True))
    low, opt, high = (spec.shape_at(count, size) for count, size in zip(batches, size_of_each, strict=True))
    return low, opt, high
