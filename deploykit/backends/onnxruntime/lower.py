"""ONNX graph -> ``model.onnx``, as ONNX Runtime reads it."""

from __future__ import annotations

from pathlib import Path

from deploykit.backends.backend import Engine, LowerOptions
from deploykit.backends.onnx_file import write_onnx
from deploykit.backends.onnxruntime.package import load_onnxruntime
from deploykit.graph import OnnxGraph
from deploykit.optional import installed_version


def lower(graph: OnnxGraph, folder: Path, options: LowerOptions) -> Engine:
    """Write the ONNX model; weights over 1.5 GB go to ``model.onnx.data``. The target decides nothing here.

    Raises:
        ExportError: ONNX's checker refuses the graph.
        MissingDependency: no onnxruntime, whose version the engine is tied to.
    """
    version = str(load_onnxruntime().__version__)
    write_onnx(graph.model, folder / "model.onnx")
    return Engine(file="model.onnx", runtime_version=version, tools={"onnx": installed_version("onnx") or "unknown"})
