"""What a lowering takes and gives: one typed artefact in, one engine file out, whatever the runtime."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from deploykit.errors import SpecError, nearest
from deploykit.graph import Graph
from deploykit.processor import PROCESSOR_TARGETS, saturates
from deploykit.runtimes.base import load_runtime
from deploykit.spec import DEFAULT_BUILD, BuildOptions, Int8, Precision

__all__ = [
    "FASTEST_MODE",
    "INDUCTOR_MODES",
    "LOWERINGS",
    "PORTABLE_LOWERINGS",
    "TARGETS",
    "TENSORRT_DEVICES",
    "Engine",
    "Graph",
    "Lowering",
    "check_build_options",
    "check_portable",
    "check_target",
    "load_lowering",
    "resolve",
    "settled",
]

LOWERINGS: dict[str, str] = {
    "torch_compile": "deploykit.export.to_inductor:to_inductor",
    "onnxruntime": "deploykit.export.to_onnxruntime:to_onnxruntime",
    "openvino": "deploykit.export.to_openvino:to_openvino",
    "tensorrt": "deploykit.export.to_tensorrt:to_tensorrt",
}

PORTABLE_LOWERINGS: dict[str, str] = {
    "tensorrt": "deploykit.export.to_tensorrt:to_portable_tensorrt",
}
"""Lowerings whose engine is finished on the device, in the runtimes whose engines are tied to one."""

OPTION_CHECKS: dict[str, str] = {
    "tensorrt": "deploykit.runtimes.tensorrt_api:check_build_options",
}
"""The runtimes whose builds take `BuildOptions`, and what refuses those that the version here does not do."""

TENSORRT_DEVICES: dict[str, str] = {
    "jetson-xavier": "sm72",
    "t4": "sm75",
    "rtx-2080": "sm75",
    "a100": "sm80",
    "a10": "sm86",
    "rtx-3090": "sm86",
    "jetson-orin": "sm87",
    "l4": "sm89",
    "rtx-4090": "sm89",
    "h100": "sm90",
    "b200": "sm100",
    "jetson-thor": "sm110",
    "rtx-5090": "sm120",
    "dgx-spark": "sm121",
}
"""The CUDA compute capability of devices by name, from NVIDIA's table (developer.nvidia.com/cuda-gpus)."""

INDUCTOR_MODES: dict[str, dict[str, Any]] = {
    "onednn": {},
    "templates": {"max_autotune": True, "max_autotune_gemm_backends": "CPP"},
    "autotuned": {"max_autotune": True, "max_autotune_gemm_backends": "CPP,ATEN"},
}
"""Inductor's settings in each mode, beside frozen weights, which all have. They differ in matrix products: oneDNN's
kernels; inductor's own C++ templates, into which what follows is fused; or the faster of the two for each product,
timed alone while it compiles.
"""
FASTEST_MODE = "fastest"
"""The target that stands for the mode that takes the least time on this machine."""

TARGETS: dict[str, tuple[str, ...]] = {
    "torch_compile": (FASTEST_MODE, *INDUCTOR_MODES),
    "tensorrt": (*sorted(set(TENSORRT_DEVICES.values()), key=lambda name: int(name[2:])), *TENSORRT_DEVICES),
    "onnxruntime": tuple(PROCESSOR_TARGETS),
    "openvino": tuple(PROCESSOR_TARGETS),
}
"""What an engine can be built for, in the runtimes that have targets: compute capabilities and devices, processors,
inductor's modes.
"""


def check_portable(runtime: str, target: str | None) -> None:
    """Refuse a portable engine of a runtime that has none, or for one target.

    Raises:
        SpecError: either.
    """
    if runtime not in PORTABLE_LOWERINGS:
        raise SpecError(
            f"portable=True was given, and {runtime} has no portable form, which {', '.join(PORTABLE_LOWERINGS)} has. "
            "Leave it out."
        )
    if target is not None:
        raise SpecError(
            f"portable=True and target={target!r} were both given; a portable engine is finished on the device that "
            "opens it, whichever it is. Leave one out."
        )


def check_build_options(runtime: str, options: BuildOptions, target: str | None, *, portable: bool) -> None:
    """Refuse build options that a runtime does not have, or not in the version that is installed here.

    Raises:
        SpecError: naming the option.
    """
    if options == DEFAULT_BUILD:
        return
    if runtime not in OPTION_CHECKS:
        raise SpecError(
            f"{options} was given, and builds for {runtime} have no such options; those for "
            f"{', '.join(OPTION_CHECKS)} have. Leave it out."
        )
    if portable:
        raise SpecError(
            f"portable=True and {options} were both given; the device that opens a portable engine builds it for "
            "itself. Leave one out."
        )
    resolve(OPTION_CHECKS[runtime])(options, target)


def load_lowering(
    runtime: str, options: BuildOptions, *, portable: bool, on_step: Callable[[str, int, int], None]
) -> Lowering:
    """The lowering of a runtime.

    Where it takes build options (see `check_build_options`) it also tells ``on_step`` of each phase of its build, the
    steps done and the steps in all.
    """
    lowering = resolve((PORTABLE_LOWERINGS if portable else LOWERINGS)[runtime])
    if portable or runtime not in OPTION_CHECKS:
        return lowering  # type: ignore[no-any-return]
    return partial(lowering, options=options, progress=on_step)


def resolve(path: str) -> Any:
    """What a row of a table names: ``module:attribute``, imported when it is first needed."""
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)


def check_target(runtime: str, target: str | None) -> None:
    """Refuse a target that a runtime does not have.

    Raises:
        SpecError: an unknown target, or one where the runtime has none.
    """
    known = TARGETS.get(runtime, ())
    if target is None or target in known:
        return
    if not known:
        raise SpecError(f"the {runtime} runtime has no targets, and target={target!r} was given. Leave it out.")
    raise SpecError(f"unknown {runtime} target {target!r}. {nearest(target, known)}")


def settled(precision: Precision, runtime: str, target: str | None) -> Precision:
    """The precision with what INT8 leaves to the target decided: whether 8-bit weights would saturate there."""
    if not isinstance(precision, Int8) or precision.reduce_range is not None:
        return precision
    return replace(precision, reduce_range=load_runtime(runtime).uses_cpu and saturates(target))


@dataclass(frozen=True, kw_only=True)
class Engine:
    """An engine file, by its name in the folder, and what it is tied to.

    ``compiler`` is what its compiler chose by measuring, where it did.
    """

    file: str
    runtime_version: str
    requires: dict[str, str] = field(default_factory=dict)
    tools: dict[str, str] = field(default_factory=dict)
    compiler: dict[str, str] = field(default_factory=dict)


class Lowering(Protocol):
    """Write a graph into ``folder`` as an engine of one runtime; raises ExportError."""

    def __call__(self, graph: Graph, folder: Path, *, target: str | None = None) -> Engine:
        """Lower ``graph``; every file goes into ``folder``."""
        ...
