"""ONNX graph -> ``model.onnx``."""

from pathlib import Path

from deploykit.backends.backend import Engine, LowerOptions
from deploykit.backends.onnx_file import write_onnx
from deploykit.graph import OnnxGraph
from deploykit.optional import installed_version


def lower(graph: OnnxGraph, folder: Path, options: LowerOptions) -> Engine:
    """Write the model as it is."""
    write_onnx(graph.model, folder / "model.onnx")
    return Engine(file="model.onnx", runtime_version=installed_version("onnx") or "unknown")
