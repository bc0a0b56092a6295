from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploykit.errors import MissingDependency, ParityError
from deploykit.export.reduce import reduce_model, with_fixed_batch
from deploykit.export.reduce_check import FAILS, UNKNOWN, WELL, CheckRequest, compare_runs, find_problem, values_of
from deploykit.export.reduce_check import main as check_main

IMAGES = np.random.default_rng(0).normal(size=(1, 4, 8)).astype(np.float32)
VALUES = {"a": np.ones(3, np.float32)}


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ({"one": VALUES}, "needs two runners; there is 1"),
        ({}, "there is 0: none"),
        ({"one": VALUES, "other": {}}, "a: other did not give it"),
        ({"one": {}, "other": VALUES}, "one gave no output; a: one did not give it"),
        ({"one": {}, "other": {}}, "one gave no output"),
        ({"one": {"a": np.ones(0)}, "other": {"a": np.ones(0)}}, "expected two equal ones with data"),
        ({"one": VALUES, "other": {"a": np.ones(4)}}, r"\(3,\) and \(4,\)"),
        ({"one": VALUES, "other": {"a": np.full(3, 2.0)}}, r"0\.0 dB in other; expected at least 40"),
        ({"one": VALUES, "other": {"a": np.full(3, np.nan)}}, "a: "),
    ],
)
def test_what_polygraphys_comparator_lets_pass_fails(runs, message: str):
    with pytest.raises(ParityError, match=message):
        compare_runs(runs, min_sqnr_db=40)


def test_equal_runs_pass():
    compare_runs({"one": VALUES, "other": {"a": VALUES["a"] * 1.0001}}, min_sqnr_db=40)


def chain(batch: int | str = 1) -> onnx.ModelProto:
    """Eight products in a row."""
    weights = [np.random.default_rng(seed).normal(size=(8, 8)).astype(np.float32) / 3 for seed in range(8)]
    nodes, source = [], "images"
    for index in range(8):
        nodes.append(helper.make_node("MatMul", [source, f"w{index}"], [f"m{index}"], name=f"product{index}"))
        source = f"m{index}"
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [batch, 4, 8])],
        [helper.make_tensor_value_info(source, TensorProto.FLOAT, [batch, 4, 8])],
        [numpy_helper.from_array(weight, f"w{index}") for index, weight in enumerate(weights)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def request_for(tmp_path: Path, model: onnx.ModelProto, runtime: str) -> CheckRequest:
    onnx.save(model, str(tmp_path / "whole.onnx"))
    np.save(tmp_path / "images.npy", IMAGES)
    files = {"whole": str(tmp_path / "whole.onnx"), "images": str(tmp_path / "images.npy")}
    return CheckRequest(**files, runtime=runtime, min_sqnr_db=60)


def test_a_part_is_run_on_the_values_that_the_whole_graph_gives_it():
    values = values_of(chain(), ["images", "m2"], IMAGES)
    assert np.array_equal(values["images"], IMAGES)
    expected = IMAGES
    for tensor in chain().graph.initializer[:3]:
        expected = expected @ numpy_helper.to_array(tensor)
    assert np.allclose(values["m2"], expected, atol=1e-5)


def test_a_graph_that_the_runtime_computes_as_it_is_written_is_well(tmp_path: Path):
    assert find_problem(chain(), request_for(tmp_path, chain(), "onnxruntime")) is None


def test_a_part_that_nobody_can_run_is_no_failure_of_the_runtime(tmp_path: Path, capsys):
    import msgspec

    request = request_for(tmp_path, chain(), "onnxruntime")
    (tmp_path / "request.json").write_bytes(msgspec.json.encode(request))
    (tmp_path / "part.onnx").write_bytes(b"garbage")
    assert check_main(str(tmp_path / "part.onnx"), str(tmp_path / "request.json")) == UNKNOWN
    assert check_main(str(tmp_path / "whole.onnx"), str(tmp_path / "request.json")) == WELL
    assert "well" in capsys.readouterr().err
    assert FAILS not in (WELL, UNKNOWN)


def test_without_polygraphy_the_pip_command_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "polygraphy", None)
    onnx.save(chain(), str(tmp_path / "model.onnx"))
    with pytest.raises(MissingDependency, match=r"deploykit\[debug\]"):
        reduce_model(
            tmp_path / "model.onnx", tmp_path / "out.onnx", images=IMAGES, runtime="onnxruntime", min_sqnr_db=60
        )


def unsupported(batch: int | str) -> onnx.ModelProto:
    """The chain with an operator in its middle that TensorRT lacks and ONNX Runtime has."""
    model = chain(batch)
    nodes = list(model.graph.node)
    nodes[4].input[0] = "odd"
    nodes[4:4] = [
        helper.make_node("DynamicQuantizeLinear", ["m3"], ["q", "s", "z"], name="odd_one"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["odd"], name="odd_two"),
    ]
    graph = helper.make_graph(nodes, "chain", model.graph.input, model.graph.output, model.graph.initializer)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def test_a_dynamic_batch_is_fixed_to_one_image_and_nothing_else_changes():
    fixed = with_fixed_batch(chain("batch"))
    values = (*fixed.graph.input, *fixed.graph.output)
    assert [[dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in values] == [[1, 4, 8], [1, 4, 8]]
    assert [node.name for node in fixed.graph.node] == [node.name for node in chain().graph.node]
    assert with_fixed_batch(chain(2)) == chain(2)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, "batch"], ids=["static", "dynamic"])
def test_what_tensorrt_refuses_is_reduced_to_the_operator(batch: int | str, tmp_path: Path):
    for package in ("polygraphy", "onnx_graphsurgeon", "tensorrt_rtx"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    model = unsupported(batch)
    onnx.save(model, str(tmp_path / "model.onnx"))
    problem = reduce_model(
        tmp_path / "model.onnx", tmp_path / "out.onnx", images=IMAGES, runtime="tensorrt", min_sqnr_db=60
    )
    assert "odd_one" in problem
    left = [node.name for node in onnx.load(tmp_path / "out.onnx").graph.node]
    assert "odd_one" in left
    assert len(left) <= 3
