from __future__ import annotations

import dataclasses
from importlib.metadata import version
from pathlib import Path

import openvino
import pytest

from deploykit.backends import onnx_file
from deploykit.backends.backend import LowerOptions
from deploykit.backends.openvino.lower import lower
from deploykit.errors import ExportError
from deploykit.spec import BatchRange
from tests.conftest_graphs import engine_of, tiny_graph


def read(folder: Path) -> openvino.Model:
    return openvino.Core().read_model(folder / "model.xml")


def test_names_and_batch_bounds_are_kept(tmp_path: Path):
    graph = tiny_graph()
    bounded = dataclasses.replace(graph, input=dataclasses.replace(graph.input, batch=BatchRange(max=5)))
    engine = lower(bounded, tmp_path, LowerOptions())
    model = read(tmp_path)
    assert engine.file == "model.xml"
    assert engine.runtime_version == version("openvino")
    assert [output.any_name for output in model.outputs] == ["stem", "stage1"]
    batch = model.input("images").partial_shape[0]
    assert (batch.min_length, batch.max_length) == (1, 5)


def test_a_fixed_batch_stays_fixed():
    _, folder = engine_of("openvino", features_only=False, dynamic=False)
    assert list(read(folder).input("images").shape) == [1, 3, 32, 32]


def test_weights_stay_in_float32(tmp_path: Path):
    lower(tiny_graph(), tmp_path, LowerOptions())
    weights = [node for node in read(tmp_path).get_ops() if node.get_type_name() == "Constant" and node.data.ndim == 4]
    assert weights
    assert all(node.get_element_type() == openvino.Type.f32 and len(node.data) in (8, 16) for node in weights)


def test_the_same_graph_gives_the_same_bytes(tmp_path: Path):
    written = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        lower(tiny_graph(), tmp_path / name, LowerOptions())
        written.append([(tmp_path / name / file).read_bytes() for file in ("model.xml", "model.bin")])
    assert written[0] == written[1]


def test_large_weights_are_read_from_their_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lower(tiny_graph(), tmp_path, LowerOptions())
    size = (tmp_path / "model.bin").stat().st_size
    monkeypatch.setattr(onnx_file, "EXTERNAL_DATA_BYTES", 100)
    lower(tiny_graph(), tmp_path, LowerOptions())
    assert (tmp_path / "model.bin").stat().st_size == size


def test_what_openvino_cannot_convert_is_an_export_error(tmp_path: Path):
    broken = tiny_graph().model.clone()
    broken.graph[0].domain = "nobody.knows"
    broken.graph.opset_imports["nobody.knows"] = 1
    with pytest.raises(ExportError, match=r"OpenVINO .* cannot convert"):
        lower(dataclasses.replace(tiny_graph(), model=broken), tmp_path, LowerOptions())
    assert not list(tmp_path.iterdir())
