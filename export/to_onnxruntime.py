"""Graph -> ``model.onnx``, as ONNX Runtime reads it."""

from __future__ import annotations

from pathlib import Path

from deploykit.export.lowering import Engine, Graph
from deploykit.export.onnx_file import model_of, write_onnx
from deploykit.optional import installed_version, require


def to_onnxruntime(graph: Graph, folder: Path, *, target: str | None = None) -> Engine:
    """Write the ONNX model; weights over 1.5 GB go to ``model.onnx.data``. ``target`` decides nothing here.

    Raises:
        ExportError: the graph has no ONNX model, or ONNX's checker refuses it.
        MissingDependency: no onnxruntime, whose version the engine is tied to.
    """
    version = str(require("onnxruntime").__version__)
    write_onnx(model_of(graph, "onnxruntime"), folder / "model.onnx")
    return Engine(file="model.onnx", runtime_version=version, tools={"onnx": installed_version("onnx") or "unknown"})
