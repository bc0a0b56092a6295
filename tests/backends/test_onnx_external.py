"""External weights of ONNX engines: those of the bundle are read from its verified bytes, all others are refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import deploykit
from deploykit.backends.onnx_external import references
from deploykit.bundle import read_manifest, write_manifest, writing
from deploykit.errors import BundleError
from tests.backends.bundles import onnx_with_external, write_bundle
from tests.conftest_graphs import photographs

OUTSIDE = [
    b"../secret.bin",
    b"/etc/hostname",
    b"a/../../secret.bin",
    b"./model.onnx.data",
    b"sub//secret.bin",
    b"..\\secret.bin",
    b"*/_ORT_MEM_ADDR_/*",
    b"absent.bin",
    b"",
]


def rewrite(bundle: Path, model: bytes) -> None:
    """Put another model into a bundle, with its digest, as an attacker does."""
    manifest = read_manifest(bundle)
    (bundle / manifest.engine).write_bytes(model)
    write_manifest(bundle, dataclasses.replace(manifest, files={}))


@pytest.mark.parametrize("location", OUTSIDE)
def test_weights_outside_the_bundle_are_refused_before_the_runtime_is_asked(location, tmp_path, monkeypatch):
    import onnxruntime

    (tmp_path / "secret.bin").write_bytes(b"\0" * 4)
    bundle = write_bundle(tmp_path / "bundle", "onnxruntime")
    rewrite(bundle, onnx_with_external(location))
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: pytest.fail("the runtime parsed it"))
    with pytest.raises(BundleError, match=r"keeps weights in|not recorded in the manifest"):
        deploykit.load_bundle(bundle)


def external(tensor: TensorProto, location: str) -> TensorProto:
    """The same tensor, kept in a file."""
    copy = TensorProto()
    copy.CopyFrom(tensor)
    copy.ClearField("raw_data")
    copy.data_location = TensorProto.EXTERNAL
    copy.external_data.add(key="offset", value="0")
    copy.external_data.add(key="location", value=location)
    return copy


WEIGHT = numpy_helper.from_array(np.arange(6, dtype=np.float32), "w")
HIDDEN = external(WEIGHT, "../w.bin")


def in_initializers() -> onnx.ModelProto:
    return model_of([helper.make_node("Add", ["x", "w"], ["y"])], [HIDDEN])


def in_a_constant() -> onnx.ModelProto:
    return model_of([helper.make_node("Constant", [], ["w"], value=HIDDEN), helper.make_node("Add", ["x", "w"], ["y"])])


def in_a_branch() -> onnx.ModelProto:
    branch = helper.make_graph([helper.make_node("Identity", ["w"], ["z"])], "branch", [], [info("z")], [HIDDEN])
    return model_of([helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)])


def in_a_function() -> onnx.ModelProto:
    model = model_of([helper.make_node("F", ["x"], ["y"], domain="own")])
    body = [helper.make_node("Constant", [], ["w"], value=HIDDEN), helper.make_node("Add", ["x", "w"], ["y"])]
    model.functions.append(helper.make_function("own", "F", ["x"], ["y"], body, [helper.make_opsetid("", 20)]))
    return model


def in_a_sparse_tensor() -> onnx.ModelProto:
    model = model_of([helper.make_node("Add", ["x", "w"], ["y"])])
    indices = numpy_helper.from_array(np.arange(6), "i")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(HIDDEN, indices, [6]))
    return model


def info(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, [6])


def model_of(nodes, initializers=()) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "g", [info("x")], [info("y")], list(initializers))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


@pytest.mark.parametrize(
    "place", [in_initializers, in_a_constant, in_a_branch, in_a_function, in_a_sparse_tensor], ids=lambda f: f.__name__
)
def test_external_data_is_found_wherever_a_tensor_may_stand(place):
    assert references(place().SerializeToString(), "model.onnx")[0] == ("../w.bin",)


def test_a_location_that_is_written_twice_is_found_both_times():
    """Protobuf takes the last of two values; both are looked at, whatever a runtime's reader takes."""
    model = onnx_with_external(b"inside.bin")
    inner = b"\x0a\x08location\x12\x0ainside.bin"
    twice = b"\x0a\x08location\x12\x0ainside.bin\x12\x06../out"
    assert model.count(inner) == 1
    grown = len(twice) - len(inner)
    start = model.index(inner)
    model = bytearray(model.replace(inner, twice))
    # The three messages around it grow by as much: the entry, the tensor and the graph, one byte each for their sizes.
    for position in sorted(_length_bytes(bytes(model), start)):
        model[position] += grown
    assert references(bytes(model), "model.onnx")[0] == ("inside.bin", "../out")


def _length_bytes(model: bytes, inside: int) -> list[int]:
    """Where the sizes of the messages around a position stand, in a model of small messages."""
    entry = inside - 1
    tensor = model.rindex(b"\x2a", 0, entry) + 1
    graph = model.index(b"\x3a") + 1
    return [entry, tensor, graph]


@pytest.mark.parametrize("cut", [1, 7, 30])
def test_a_cut_model_is_a_bundle_error(cut):
    with pytest.raises(BundleError, match="not a readable ONNX file"):
        references(in_initializers().SerializeToString()[:-cut], "model.onnx")


def test_a_model_without_external_data_refers_to_nothing():
    assert references(model_of([helper.make_node("Identity", ["x"], ["y"])]).SerializeToString(), "m") == (
        (),
        frozenset(),
    )


def test_code_compiled_by_another_program_is_refused(tmp_path):
    bundle = write_bundle(tmp_path / "bundle", "onnxruntime")
    node = helper.make_node("EPContext", ["x"], ["y"], domain="com.microsoft", ep_cache_context="../engine.bin")
    rewrite(bundle, model_of([node]).SerializeToString())
    with pytest.raises(BundleError, match="EPContext: code that was compiled elsewhere"):
        deploykit.load_bundle(bundle)


@pytest.fixture
def with_weights(tmp_path: Path) -> Path:
    """A bundle whose weights lie beside its ONNX file, as large ones do."""
    source = write_bundle(tmp_path / "whole", "onnxruntime")
    folder = tmp_path / "split"
    with writing(folder) as staging:
        model = onnx.load(source / "model.onnx")
        onnx.save_model(
            model,
            str(staging / "model.onnx"),
            save_as_external_data=True,
            location="model.onnx.data",
            size_threshold=0,
        )
        (staging / "reference.npz").write_bytes((source / "reference.npz").read_bytes())
        write_manifest(staging, dataclasses.replace(read_manifest(source), files={}))
    return folder


@pytest.mark.parametrize("in_memory", [True, False], ids=["1.24 and newer", "before 1.24"])
def test_weights_of_the_bundle_are_taken_from_its_verified_bytes(with_weights, in_memory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.onnx.data").write_bytes(b"\0" * 100_000)  # what a runtime finds that looks for it by its name
    if not in_memory:
        from deploykit.backends.onnxruntime import adapter

        monkeypatch.setattr(adapter, "FROM_MEMORY", "not_there")
    assert deploykit.verify_bundle(with_weights).passed


def test_external_weights_that_were_changed_are_refused(with_weights):
    data = with_weights / "model.onnx.data"
    data.write_bytes(bytes(reversed(data.read_bytes())))
    with pytest.raises(BundleError, match=r"model\.onnx\.data: SHA-256"):
        deploykit.load_bundle(with_weights)


def test_a_session_reads_the_engine_as_onnx_alone(tmp_path):
    """ONNX Runtime's own format is found by its first bytes, and holds names of files in another place."""
    bundle = write_bundle(tmp_path / "bundle", "onnxruntime")
    rewrite(bundle, b"\x08\x00\x00\x00ORTM" + bytes(64))
    with pytest.raises(BundleError, match=r"not a readable ONNX file"):
        deploykit.load_bundle(bundle)


def test_the_numbers_are_those_of_the_whole_bundle(with_weights, tmp_path):
    images = photographs(2)
    with deploykit.load_bundle(with_weights) as split, deploykit.load_bundle(tmp_path / "whole") as whole:
        np.testing.assert_array_equal(split(images)["stage1"], whole(images)["stage1"])
