"""The walk over layers: a fault is named where it is, whatever the layers after it inherit."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploykit.bundle import read_manifest, write_manifest
from deploykit.cli.verify_layers import show_layers
from deploykit.errors import SpecError
from deploykit.export.bundle_layers import bundle_layers
from deploykit.export.float_activations import without_activation_quantizers
from deploykit.export.layer_walk import typed
from deploykit.export.layers import LayerReport, compare_layers
from deploykit.export.runtime_layers import compare_in_runtime
from tests.cli.conftest import call
from tests.test_pipeline_examples import drifted as with_drift

BUNDLES = Path(__file__).parent.parent / "data" / "bundles-0.1.0"
INT8 = BUNDLES / "onnxruntime-int8"
IMAGES = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)


def network(**changes) -> ir.Model:
    """Four convolutions with a residual; ``changes`` is a weight's factor by its name, or ``drop="relu"``."""
    generator = np.random.default_rng(1)
    nodes, weights, source = [], [], "images"
    for index in range(4):
        name = f"conv{index}"
        weight = generator.standard_normal((3, 3, 3, 3)).astype(np.float32) / 5
        weights.append(numpy_helper.from_array(weight * np.float32(changes.get(name, 1)), f"{name}.weight"))
        nodes.append(helper.make_node("Conv", [source, f"{name}.weight"], [name], f"node_{name}", pads=[1] * 4))
        source = name
        if index == 1 and changes.get("drop") != "relu":
            nodes.append(helper.make_node("Relu", [name], ["relu"], "node_relu"))
            source = "relu"
    nodes.append(helper.make_node("Add", ["conv3", "conv0"], ["out"], "node_add"))
    shape = [2, 3, 8, 8]
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, shape)],
        weights,
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9))


@pytest.mark.parametrize("fault", [1.01, -1.0, 0.0])
@pytest.mark.parametrize("name", ["conv0", "conv2", "conv3"])
def test_a_wrong_weight_is_found_at_its_node(name, fault):
    report = compare_layers(network(**{name: fault}), IMAGES, reference=network(), min_own_db=60)
    wrong = [layer.tensor for layer in report.layers if layer.own_db < 300]
    assert wrong == [name]
    assert (report.culprit.node, report.culprit.module) == (f"node_{name}", name)
    inherited = {layer.tensor: layer.whole_db for layer in report.layers}
    assert inherited["out"] < 60


def test_an_activation_that_is_gone_is_named_and_found_at_its_reader():
    report = compare_layers(network(drop="relu"), IMAGES, reference=network(), min_own_db=60)
    assert report.culprit.node == "node_conv2"
    assert (report.only_reference, report.only_candidate) == ({"Relu": 1}, {})


def test_equal_graphs_have_no_culprit():
    report = compare_layers(network(), IMAGES, reference=network(), min_own_db=60)
    assert report.culprit is None
    assert {layer.own_db for layer in report.layers} == {300.0}


def test_graphs_that_share_no_name_are_refused():
    other = network()
    for node in other.graph:
        node.outputs[0].name = f"other_{node.outputs[0].name}"
    with pytest.raises(SpecError, match="name no tensor alike"):
        compare_layers(network(), IMAGES, reference=other)


class Levels:
    """Two outputs of one shape, ``a`` and ``b``, which a change may touch."""

    def __init__(self) -> None:
        self.model = network()
        graph = self.model.graph
        first = next(node for node in graph if node.name == "node_conv0").outputs[0]
        graph.outputs.insert(0, first)
        first.name, graph.outputs[1].name = "a", "b"
        for value in graph.outputs:
            value.shape, value.type = ir.Shape([2, 3, 8, 8]), ir.TensorType(ir.DataType.FLOAT)

    def compared(self, change) -> LayerReport:
        candidate = self.model.clone()
        change(candidate.graph)
        return compare_layers(candidate, IMAGES, reference=self.model, min_own_db=60, outputs=("a", "b"))


def renamed(graph):
    graph.outputs[0].name = "c"


def exchanged(graph):
    first, second = graph.outputs
    first.name, second.name = "b", "a"


def frozen(graph):
    """The deep output is a constant: an answer that was kept."""
    answer = ir.tensor(np.ones((2, 3, 8, 8), np.float32))
    constant = ir.node("Constant", [], {"value": answer}, name="node_kept")
    constant.outputs[0].name = "b"
    graph.insert_before(graph.node(0), constant)
    old = graph.outputs[1]
    old.name = "computed"
    constant.outputs[0].shape, constant.outputs[0].type = old.shape, old.type
    graph.outputs[1] = constant.outputs[0]


def left_out(graph):
    graph.outputs.pop(0)


@pytest.mark.parametrize(
    ("change", "node", "note"),
    [
        (renamed, "node_conv0", "gives 'c', which is no output of the network; it gives what 'a' should"),
        (exchanged, "node_conv0", "'b' gives what 'a' should"),
        (frozen, "node_kept", "'b' does not depend on the images"),
        (left_out, "node_conv0", "'a' is an output of the network, and the graph does not give it"),
    ],
)
def test_an_output_that_is_not_what_its_name_says_is_found_at_its_node(change, node, note):
    levels = Levels()
    assert levels.compared(lambda graph: None).culprit is None
    culprit = levels.compared(change).culprit
    assert culprit.node == node
    assert note in culprit.note


def test_products_that_are_quantized_at_each_call_are_compared_with_float():
    generator = np.random.default_rng(0)
    weights = {"w": generator.integers(-63, 64, (6, 4)).astype(np.int8), "z": np.zeros(4, np.int8)}
    weights |= {"s": np.full(4, 0.01, np.float32), "b": np.ones(4, np.float32)}
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["images"], ["q", "qs", "qz"], "quantize"),
        helper.make_node("MatMulInteger", ["q", "w", "qz", "z"], ["product"], "node_one/product"),
        helper.make_node("Cast", ["product"], ["floats"], "node_one/float", to=TensorProto.FLOAT),
        helper.make_node("Mul", ["qs", "s"], ["step"], "node_one/step"),
        helper.make_node("Mul", ["floats", "step"], ["one"], "node_one/scaled"),
        helper.make_node(
            "MatMulIntegerToFloat",
            ["q", "w", "qs", "s", "qz", "", "b"],
            ["two"],
            "node_two",
            domain="com.microsoft",
        ),
        helper.make_node("Sub", ["two", "one"], ["out"], "node_sub"),
    ]
    values = [helper.make_tensor_value_info(*each) for each in (("two", 1, [3, 4]), ("out", 1, [3, 4]))]
    graph = helper.make_graph(
        nodes,
        "products",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [3, 6])],
        [values[1]],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
        value_info=[values[0]],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=9))
    images = generator.standard_normal((3, 6)).astype(np.float32)
    report = compare_layers(model, images, modules={"node_one": "blocks.0.fc"})
    own = {layer.tensor: layer for layer in report.layers}
    assert 25 < own["floats"].own_db < 60
    assert 25 < own["two"].own_db < 60
    assert (own["floats"].module, own["floats"].quantizer) == ("blocks.0.fc", "a scale for each call")
    floating = without_activation_quantizers(model)
    assert {"MatMulInteger", "MatMulIntegerToFloat"} & {node.op_type for node in floating.graph} == set()


def test_without_quantizers_there_is_nothing_to_leave_out():
    with pytest.raises(SpecError, match="quantizes no activations"):
        without_activation_quantizers(network())


def test_a_quantized_engine_is_compared_with_itself_in_float():
    report = bundle_layers(INT8)
    assert report.min_own_db is None
    assert report.culprit.own_db == min(layer.own_db for layer in report.layers)
    assert 20 < report.culprit.own_db < 80
    assert any(layer.quantizer and "zero point" in layer.quantizer for layer in report.layers)
    assert any(layer.module for layer in report.layers)


@pytest.fixture
def drifted(tmp_path) -> tuple[Path, str]:
    """The INT8 bundle with one weight's scale one percent larger, and the node that reads it."""
    folder = with_drift(tmp_path / "drifted", 1.01)
    before, after = (onnx.load(each / "model.onnx") for each in (INT8, folder))
    (name,) = (
        a.name
        for a, b in zip(before.graph.initializer, after.graph.initializer, strict=True)
        if a.raw_data != b.raw_data
    )
    (restored,) = (node.output[0] for node in after.graph.node if name in node.input)
    (reader,) = (node.name for node in after.graph.node if restored in node.input)
    return folder, reader


def test_one_percent_of_an_int8_weight_is_found_beside_the_release(drifted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, reader = drifted
    done = call("verify", folder, "--layers", "--reference", INT8, "--json")
    found = done.json()
    assert found["culprit"]["node"] == reader
    assert sum(layer["own_db"] < 60 for layer in found["layers"]["layers"]) == 1
    arrays = np.load(tmp_path / "drifted-culprit.npz", allow_pickle=False)
    alone = onnx.load(tmp_path / "drifted-culprit.onnx")
    assert {f"input/{value.name}" for value in alone.graph.input} == set(arrays.files) - {"expected"}
    text = call("verify", folder, "--layers", "--reference", INT8)
    assert f"The first culprit is {reader}" in text.out


def test_what_cannot_be_walked_is_refused(tmp_path):
    with pytest.raises(SpecError, match=r"holds model\.xml, whose layers cannot be read"):
        bundle_layers(BUNDLES / "openvino-int8")
    other = shutil.copytree(INT8, tmp_path / "other")
    manifest = read_manifest(other)
    for name in ("manifest.json", "manifest.sha256"):
        (other / name).unlink()
    write_manifest(other, dataclasses.replace(manifest, fusions={"equalize-channels": 3}))
    with pytest.raises(SpecError, match="do not correspond"):
        bundle_layers(INT8, other)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_one_graph_in_two_runtimes_gives_every_layer_alike(runtime):
    report = bundle_layers(INT8, runtime=runtime)
    assert report.culprit is None
    assert len(report.layers) == 4  # between quantizers
    assert all(min(layer.own_db, layer.whole_db) >= 30 for layer in report.layers)


def test_a_layer_that_a_runtime_computes_otherwise_is_named_and_runs_alone(monkeypatch, tmp_path):
    from deploykit.backends.onnxruntime import debug

    right = debug.run_part

    def wrong(part, inputs):
        """A runtime whose third convolution has the wrong sign."""
        arrays = right(part, inputs)
        return [
            -array if value.name == "conv2" else array for value, array in zip(part.graph.outputs, arrays, strict=True)
        ]

    monkeypatch.setattr(debug, "run_part", wrong)
    report = compare_in_runtime(network(), IMAGES, "onnxruntime", reproducer=tmp_path / "alone.onnx")
    assert (report.culprit.node, report.culprit.tensor) == ("node_conv2", "conv2")
    with np.load(tmp_path / "alone.npz") as arrays:
        feeds = {name.removeprefix("input/"): arrays[name] for name in arrays.files if name.startswith("input/")}
        session = onnxruntime.InferenceSession(tmp_path / "alone.onnx", providers=["CPUExecutionProvider"])
        np.testing.assert_allclose(session.run(None, feeds)[0], arrays["expected"], rtol=1e-4, atol=1e-5)


def test_what_cannot_be_walked_in_a_runtime_is_named(tmp_path):
    with pytest.raises(SpecError, match=r"torch_compile reads no parts.*onnxruntime, openvino"):
        bundle_layers(INT8, runtime="torch_compile")
    with pytest.raises(SpecError, match="one of the two"):
        bundle_layers(INT8, tmp_path, runtime="openvino")


def test_a_graph_whose_types_contradict_each_other_is_walked_without_a_traceback(capsys, caplog):
    one = ir.Value(name="images", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, 2]))
    node = ir.node("Relu", [one], name="relu")
    node.outputs[0].name, node.outputs[0].type = "relu", ir.TensorType(ir.DataType.FLOAT16)
    last = ir.node("Neg", [node.outputs[0]], name="neg")  # says no type, so that types are looked for
    last.outputs[0].name = "neg"
    model = ir.Model(ir.Graph([one], last.outputs, nodes=[node, last], opset_imports={"": 20}), ir_version=10)
    assert [node.op_type for node in typed(model).graph] == ["Relu", "Neg"]
    assert not caplog.records
    assert capsys.readouterr().err == ""


def test_what_only_one_side_has_and_no_culprit_are_said(capsys):
    show_layers("bundle", compare_layers(network(drop="relu"), IMAGES, reference=network()))
    assert "only the reference has: 1 Relu." in " ".join(capsys.readouterr().out.split())
    show_layers("bundle", compare_layers(network(), IMAGES, reference=network(), min_own_db=60))
    assert "layers gives what the reference's gives, on the same input." in capsys.readouterr().out
