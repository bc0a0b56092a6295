"""An ONNX graph becomes one file with the context binary of one SoC, or an error that names what QNN does not take."""

from __future__ import annotations

import dataclasses
import sys

import onnx
import onnx_ir as ir
import pytest

from deploykit.backends.backend import LowerOptions
from deploykit.backends.onnxruntime.needs import least_version
from deploykit.backends.onnxruntime.qnn import lower as lower_module
from deploykit.backends.onnxruntime.qnn.compiler import COMPILED
from deploykit.backends.onnxruntime.qnn.context_file import CONTEXT, check_context
from deploykit.backends.onnxruntime.qnn.lower import lower
from deploykit.errors import ExportError, MissingDependency, SpecError
from tests.backends.onnxruntime.qnn.conftest import OPTIONS, SOC, TARGET


@pytest.mark.parametrize(
    "name",
    [
        "residual_engine",
        "tokens_engine",
        "windows_engine",
        "half_engine",
        pytest.param("half_windows_engine", marks=pytest.mark.slow),
    ],
)
def test_every_node_is_in_the_context_and_nothing_lies_beside_it(name, request):
    made = request.getfixturevalue(name)
    assert [path.name for path in made.folder.iterdir()] == ["model.onnx"]
    check_context(made.path.read_bytes(), "model.onnx")
    model = onnx.load(made.path)
    assert [node.op_type for node in model.graph.node] == [CONTEXT]
    assert not model.graph.initializer
    assert [value.name for value in model.graph.output] == [output.name for output in made.graph.outputs]
    assert made.engine.requires["soc_model"] == SOC["soc_model"]
    assert {"htp_arch", "qnn_sdk"} < made.engine.requires.keys()


def test_the_file_opens_in_the_oldest_onnxruntime_that_loads_the_plugin(residual_engine):
    assert least_version(residual_engine.path.read_bytes(), "model.onnx") == "1.24"
    opsets = {entry.domain: entry.version for entry in onnx.load(residual_engine.path).opset_import}
    assert opsets.keys() == {"", "com.microsoft"}


def test_an_operator_that_qnn_lacks_is_named_and_not_left_to_the_cpu(residual, tmp_path):
    pytest.importorskip("onnxruntime_qnn", reason="onnxruntime-qnn is not installed")
    graph = with_erf(residual.graph)
    with pytest.raises(ExportError, match=r"(?s)does not take 1 of .*none is left to the CPU.*Erf 'the_erf': ") as told:
        lower(graph, tmp_path, OPTIONS)
    assert "SoC 57, HTP v75" in str(told.value)
    assert not list(tmp_path.iterdir())


def test_a_context_beside_a_node_of_the_cpu_is_no_engine(residual_engine, tmp_path, monkeypatch):
    """QNN alone decides what becomes of the nodes, so what it wrote is read once more."""
    model = onnx.load(residual_engine.path)
    model.graph.node.append(onnx.helper.make_node("Relu", [model.graph.output[0].name], ["more"]))

    def compile_all_but_one(folder, soc_model, htp_arch):
        onnx.save(model, folder / COMPILED)

    monkeypatch.setattr(lower_module, "_compile", compile_all_but_one)
    with pytest.raises(ExportError, match="QNN left Relu of the graph to the CPU"):
        lower(residual_engine.graph, tmp_path, OPTIONS)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("settings", [{}, {"soc_model": "57"}, {"soc_model": "SM8650", "htp_arch": "75"}])
def test_an_soc_is_needed_by_its_number(residual, tmp_path, settings):
    """QNN takes an unknown name for no SoC at all."""
    with pytest.raises(SpecError, match=r"built for one SoC, and .* expected a number"):
        lower(residual.graph, tmp_path, LowerOptions(settings=settings))


def test_an_npu_without_float_refuses_the_float_nodes(residual_engine, tmp_path):
    options = LowerOptions(settings={"soc_model": "93", "htp_arch": "68"})
    with pytest.raises(ExportError, match=r"(?s)SoC 93, HTP v68.*Cast"):
        lower(residual_engine.graph, tmp_path, options)


def test_an_soc_that_qnn_does_not_know_is_told_in_its_words(residual_engine, tmp_path):
    options = LowerOptions(settings={"soc_model": "9999", "htp_arch": "75"})
    with pytest.raises(ExportError, match=r"(?s)for SoC 9999, HTP v75\. .*It says:.*Invalid config"):
        lower(residual_engine.graph, tmp_path, options)


def test_two_compilations_give_the_same_bytes(residual_engine, tmp_path):
    lower(residual_engine.graph, tmp_path, OPTIONS)
    assert (tmp_path / "model.onnx").read_bytes() == residual_engine.path.read_bytes()


def test_the_package_is_named_where_it_is_missing(residual, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime_qnn", None)
    with pytest.raises(MissingDependency, match=r"onnxruntime-qnn.*pip install onnxruntime-qnn"):
        lower(residual.graph, tmp_path, OPTIONS)
    import deploykit

    with pytest.raises(MissingDependency, match=f"{TARGET.name} prefers onnxruntime on qnn: .*onnxruntime-qnn"):
        deploykit.export_backbone("resnet18", tmp_path / "bundle", target="sm8650", precision="fp16")
    assert not list(tmp_path.iterdir())


def with_erf(graph):
    """The graph with an Erf behind its first output, which QNN does not have by itself."""
    model = graph.model.clone()
    output = model.graph.outputs[0]
    node = ir.node("Erf", [output], name="the_erf")
    node.outputs[0].shape, node.outputs[0].type, node.outputs[0].name = output.shape, output.type, "erf"
    model.graph.append(node)
    model.graph.outputs[0] = node.outputs[0]
    outputs = (dataclasses.replace(graph.outputs[0], name="erf"), *graph.outputs[1:])
    return dataclasses.replace(graph, model=model, outputs=outputs)
