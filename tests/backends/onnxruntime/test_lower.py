from __future__ import annotations

import dataclasses
from importlib.metadata import version
from pathlib import Path

import onnx_ir as ir
import pytest

from deploykit.backends import onnx_file
from deploykit.backends.backend import LowerOptions
from deploykit.backends.onnxruntime.lower import lower
from deploykit.errors import ExportError
from tests.conftest_graphs import manifest_of, open_engine, photographs, reference, sqnr_db, tiny_graph


def test_the_engine_names_its_file_and_version(tmp_path: Path):
    engine = lower(tiny_graph(), tmp_path, LowerOptions())
    assert [path.name for path in tmp_path.iterdir()] == [engine.file] == ["model.onnx"]
    assert engine.runtime_version == version("onnxruntime")


def test_the_same_graph_gives_the_same_bytes(tmp_path: Path):
    lower(tiny_graph(), tmp_path, LowerOptions())
    first = (tmp_path / "model.onnx").read_bytes()
    lower(tiny_graph(), tmp_path, LowerOptions())
    assert (tmp_path / "model.onnx").read_bytes() == first


def test_large_weights_go_beside_the_model_and_the_graph_keeps_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(onnx_file, "EXTERNAL_DATA_BYTES", 100)
    graph = tiny_graph()
    engine = lower(graph, tmp_path, LowerOptions())
    assert (tmp_path / "model.onnx.data").stat().st_size > 1024
    tensors = [value.const_value for value in graph.model.graph.initializers.values()]
    assert not [tensor.name for tensor in tensors if isinstance(tensor, ir.ExternalTensor)]
    with open_engine(manifest_of("onnxruntime", graph, engine), tmp_path) as model:
        images = photographs(2)
        assert sqnr_db(reference(images)[1], model(images)["stage1"]) >= 100


def test_an_invalid_graph_is_refused_and_nothing_is_written(tmp_path: Path):
    broken = tiny_graph().model.clone()
    broken.graph[0].op_type = "NoSuchOperator"
    with pytest.raises(ExportError, match="NoSuchOperator"):
        lower(dataclasses.replace(tiny_graph(), model=broken), tmp_path, LowerOptions())
    assert not list(tmp_path.iterdir())
