from __future__ import annotations

import dataclasses
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import pytest

from deploykit.errors import ExportError
from deploykit.export import onnx_file
from deploykit.export.to_onnxruntime import to_onnxruntime
from tests.conftest_graphs import manifest_of, open_engine, photographs, reference, sqnr_db, tiny_graph


def test_the_engine_names_its_file_and_version(tmp_path: Path):
    engine = to_onnxruntime(tiny_graph(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [engine.file] == ["model.onnx"]
    assert engine.runtime_version == version("onnxruntime")


def test_the_same_graph_gives_the_same_bytes(tmp_path: Path):
    to_onnxruntime(tiny_graph(), tmp_path)
    first = (tmp_path / "model.onnx").read_bytes()
    to_onnxruntime(tiny_graph(), tmp_path)
    assert (tmp_path / "model.onnx").read_bytes() == first


def test_large_weights_go_beside_the_model_and_the_graph_keeps_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(onnx_file, "EXTERNAL_DATA_BYTES", 100)
    graph = tiny_graph()
    engine = to_onnxruntime(graph, tmp_path)
    assert (tmp_path / "model.onnx.data").stat().st_size > 1024
    assert all(tensor.data_location == onnx.TensorProto.DEFAULT for tensor in graph.model.graph.initializer)
    with open_engine(manifest_of("onnxruntime", graph, engine), tmp_path) as model:
        images = photographs(2)
        assert sqnr_db(reference(images)[1], model(images)["stage1"]) >= 100


def test_an_invalid_graph_is_refused_and_nothing_is_written(tmp_path: Path):
    broken = onnx.ModelProto()
    broken.CopyFrom(tiny_graph().model)
    broken.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(ExportError, match="NoSuchOperator"):
        to_onnxruntime(dataclasses.replace(tiny_graph(), model=broken), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_graph_without_a_model_is_refused(tmp_path: Path):
    with pytest.raises(ExportError, match="needs an ONNX model"):
        to_onnxruntime(dataclasses.replace(tiny_graph(), model=None), tmp_path)


def test_weight_bytes_counts_the_initializers():
    tensor = onnx.numpy_helper.from_array(np.zeros((3, 5), np.float32), "w")
    model = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], [tensor]))
    assert onnx_file.weight_bytes(model) == 60
