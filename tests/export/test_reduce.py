from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploykit.bundle import write_manifest, writing
from deploykit.errors import DeployKitError, ExportError, MissingDependency, SpecError
from deploykit.export.reduce import _polygraphy, reduce_bundle, reduce_model, with_fixed_batch
from deploykit.export.reduce_check import FAILS, UNKNOWN, WELL, CheckRequest, find_problem
from deploykit.export.reduce_check import main as check_main
from deploykit.onnx_session import values_of
from tests.test_bundle import manifest

IMAGES = np.random.default_rng(0).normal(size=(1, 4, 8)).astype(np.float32)


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
    values = values_of(ir.from_proto(chain()), ["images", "m2"], IMAGES)
    assert np.array_equal(values["images"], IMAGES)
    expected = IMAGES
    for tensor in chain().graph.initializer[:3]:
        expected = expected @ numpy_helper.to_array(tensor)
    assert np.allclose(values["m2"], expected, atol=1e-5)


def test_a_graph_that_the_runtime_computes_as_it_is_written_is_well(tmp_path: Path):
    assert find_problem(ir.from_proto(chain()), request_for(tmp_path, chain(), "onnxruntime")) is None


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
    with pytest.raises(MissingDependency, match="pip install polygraphy"):
        reduce_model(
            tmp_path / "model.onnx", tmp_path / "out.onnx", images=IMAGES, runtime="onnxruntime", min_sqnr_db=60
        )


def test_a_bundle_without_an_onnx_graph_is_refused_with_the_runtimes_that_have_one(tmp_path: Path):
    with writing(tmp_path / "bundle", overwrite=False) as staging:
        (staging / "model.xml").write_bytes(b"engine")
        write_manifest(staging, manifest(runtime="openvino", engine="model.xml"))
    with pytest.raises(SpecError, match=r"holds model\.xml.*those of onnxruntime, tensorrt \(portable ones\)"):
        reduce_bundle(tmp_path / "bundle", tmp_path / "out.onnx")


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


def test_a_reduction_that_takes_too_long_is_stopped_and_one_that_fails_shows_its_log(tmp_path: Path):
    pytest.importorskip("polygraphy", reason="polygraphy is not installed")
    onnx.save(chain(), str(tmp_path / "chain.onnx"))
    with pytest.raises(
        ExportError, match=r"reducing chain\.onnx took more than 0\.01 s and was stopped\. Reduce a small"
    ):
        _polygraphy(tmp_path / "chain.onnx", tmp_path, 0.01)
    (tmp_path / "garbage.onnx").write_bytes(b"garbage")
    with pytest.raises(DeployKitError, match=r"polygraphy debug reduce failed on garbage\.onnx\. Its log ends with:\n"):
        _polygraphy(tmp_path / "garbage.onnx", tmp_path, 60)
