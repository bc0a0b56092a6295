"""What a lowering takes and gives: one typed artefact in, one engine file out, whatever the runtime."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from deploykit.graph import Graph

__all__ = ["LOWERINGS", "Engine", "Graph", "Lowering"]

LOWERINGS: dict[str, str] = {
    "torch_compile": "deploykit.export.to_inductor:to_inductor",
    "onnxruntime": "deploykit.export.to_onnxruntime:to_onnxruntime",
    "openvino": "deploykit.export.to_openvino:to_openvino",
    "tensorrt": "deploykit.export.to_tensorrt:to_tensorrt",
}


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
