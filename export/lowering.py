"""What a lowering takes and gives: one typed artefact in, one engine file out, whatever the runtime."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from deploykit.errors import SpecError, nearest
from deploykit.graph import Graph

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
    "check_portable",
    "check_target",
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
}
"""What an engine can be built for, in the runtimes that have targets: capabilities and devices; inductor's modes."""


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
