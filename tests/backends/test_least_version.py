"""Which versions open an engine: those that have what it needs, whoever wrote it."""

from __future__ import annotations

import onnx
import pytest
from onnx import TensorProto, helper

from deploykit.backends.backend import Backend
from deploykit.backends.onnx_header import onnx_needs
from deploykit.backends.onnxruntime import needs as ort_needs
from deploykit.backends.openvino import needs as ov_needs
from deploykit.errors import BundleError, IncompatibleEngine
from deploykit.loading import load_bundle
from tests.test_older_bundles import BUNDLES


def model(*, ir_version: int = 10, opset: int = 21, domain: str = "", operator: str = "Relu") -> bytes:
    """A model whose one node lies inside a branch of another."""
    inner = helper.make_graph(
        [helper.make_node(operator, ["x"], ["y"], domain=domain)],
        "inner",
        [],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])],
    )
    whole = helper.make_graph(
        [helper.make_node("If", ["condition"], ["z"], then_branch=inner, else_branch=inner)],
        "whole",
        [helper.make_tensor_value_info("condition", TensorProto.BOOL, [])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, [2])],
    )
    opsets = [helper.make_opsetid("", opset), *([helper.make_opsetid(domain, 1)] if domain else [])]
    made = helper.make_model(whole, opset_imports=opsets)
    made.ir_version = ir_version
    return made.SerializeToString()


def test_what_a_model_needs_is_read_from_its_bytes_through_its_branches():
    found = onnx_needs(model(domain="com.microsoft", operator="Attention"), "model.onnx")
    assert found.ir_version == 10
    assert found.opsets == {"": 21, "com.microsoft": 1}
    assert found.operators == {("", "If"), ("com.microsoft", "Attention")}


def test_it_is_what_onnx_reads_of_a_whole_bundle():
    path = BUNDLES / "onnxruntime-int8" / "model.onnx"
    read, found = onnx.load(path), onnx_needs(path.read_bytes(), path.name)
    assert found.ir_version == read.ir_version
    assert found.opsets == {entry.domain: entry.version for entry in read.opset_import}
    assert found.operators == {(node.domain, node.op_type) for node in read.graph.node}


@pytest.mark.parametrize("cut", [1, 7, 100])
def test_a_file_that_is_cut_short_is_refused(cut):
    with pytest.raises(BundleError, match=r"model\.onnx is not a readable ONNX file"):
        onnx_needs(model()[:-cut], "model.onnx")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "1.19"),
        ({"opset": 22}, "1.21"),
        ({"opset": 23}, "1.23"),
        ({"ir_version": 11}, "1.23"),
        ({"ir_version": 13, "opset": 26}, "1.25"),
        ({"opset": 99}, None),
        ({"domain": "com.microsoft", "operator": "Attention"}, "1.19"),
        ({"domain": "com.microsoft", "operator": "FromTomorrow"}, None),
        ({"domain": "mine", "operator": "Mine"}, None),
    ],
)
def test_onnx_files_need_what_their_versions_and_operators_say(settings, expected):
    assert ort_needs.least_version(model(**settings), "model.onnx") == expected


@pytest.mark.parametrize(
    ("version", "opsets", "expected"),
    [
        ("11", ("opset1", "opset13"), "2024.0"),
        ("11", ("opset16",), "2025.0"),
        ("11", ("opset99",), None),
        ("11", ("opset1", "ie_internal_opset"), None),
        ("12", ("opset1",), None),
        ("11", (), None),
    ],
)
def test_irs_need_what_their_opsets_say(version, opsets, expected):
    layers = "".join(f'<layer id="0" name="a" type="Add" version="{opset}"/>' for opset in opsets)
    text = f'<?xml version="1.0"?>\n<net name="n" version="{version}"><layers>{layers}</layers></net>'
    assert ov_needs.least_version(text.encode(), "model.xml") == expected


@pytest.mark.parametrize(
    ("runtime", "older", "too_old"),
    [("onnxruntime", "1.23.0", "1.18.1"), ("openvino", "2025.0.0", "2023.3.0")],
)
def test_an_older_version_opens_what_it_can_read(runtime, older, too_old, monkeypatch):
    pytest.importorskip(runtime)
    monkeypatch.setattr(Backend, "installed_version", lambda self: older)
    load_bundle(BUNDLES / f"{runtime}-int8").close()
    monkeypatch.setattr(Backend, "installed_version", lambda self: too_old)
    with pytest.raises(IncompatibleEngine, match=rf"{too_old} is installed here; it needs at least \d+.*Install '"):
        load_bundle(BUNDLES / f"{runtime}-int8")


def test_machine_code_opens_in_its_version_alone(monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setattr(Backend, "installed_version", lambda self: "99.0")
    with pytest.raises(IncompatibleEngine, match=r"it needs exactly .*Install 'torch=="):
        load_bundle(BUNDLES / "torch_compile-fp32")
