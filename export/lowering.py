"""What a lowering takes and gives: one typed artefact in, one engine file out, whatever the runtime."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from deploykit.errors import SpecError, nearest
from deploykit.graph import Graph

__all__ = ["LOWERINGS", "TARGETS", "Engine", "Graph", "Lowering", "check_target"]

LOWERINGS: dict[str, str] = {
    "torch_compile": "deploykit.export.to_inductor:to_inductor",
    "onnxruntime": "deploykit.export.to_onnxruntime:to_onnxruntime",
    "openvino": "deploykit.export.to_openvino:to_openvino",
    "tensorrt": "deploykit.export.to_tensorrt:to_tensorrt",
}

TARGETS: dict[str, tuple[str, ...]] = {
    "tensorrt": ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121"),
}
"""What an engine can be built for, in the runtimes that have targets: CUDA compute capabilities."""


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
    """An engine file, by its name in the folder, and what it is tied to."""

    file: str
    runtime_version: str
    requires: dict[str, str] = field(default_factory=dict)
    tools: dict[str, str] = field(default_factory=dict)


class Lowering(Protocol):
    """Write a graph into ``folder`` as an engine of one runtime; raises ExportError."""

    def __call__(self, graph: Graph, folder: Path, *, target: str | None = None) -> Engine:
        """Lower ``graph``; every file goes into ``folder``."""
        ...
