from __future__ import annotations

import dataclasses
import signal
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from deploykit.errors import ExportError
from deploykit.export.lowering import Graph
from deploykit.export.to_tensorrt import check_quantization, to_tensorrt
from deploykit.spec import InputSpec, TensorSpec
from tests.conftest_graphs import tiny_graph


def quantized(zero_point: np.ndarray | None, *, output_dtype: int | None = None) -> Graph:
    """Relu, Q, DQ, Conv: the activation's Q/DQ pair has this zero point."""
    constants = {"scale": np.float32(0.02), "weight": np.ones((8, 3, 3, 3), np.float32)}
    if zero_point is not None:
        constants["zero"] = zero_point
    pair = ["scale", "zero"] if zero_point is not None else ["scale"]
    dtype = {} if output_dtype is None else {"output_dtype": output_dtype}
    nodes = [
        helper.make_node("Relu", ["images"], ["relu"]),
        helper.make_node("QuantizeLinear", ["relu", *pair], ["q"], name="quantize_relu", **dtype),
        helper.make_node("DequantizeLinear", ["q", *pair], ["dq"], name="dequantize_relu"),
        helper.make_node("Conv", ["dq", "weight"], ["logits"]),
    ]
    body = helper.make_graph(
        nodes,
        "quantized",
        [helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, [1, 3, 32, 32])],
        [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, [1, 8, 30, 30])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    spec = InputSpec(height=32, width=32)
    return Graph(input=spec, outputs=(TensorSpec(name="logits", shape=(1, 8, 30, 30)),), model=model)


@pytest.mark.parametrize("target", [None, "sm89", "sm120"])
def test_a_dynamic_plan_is_built_without_a_gpu(target: str | None, tmp_path: Path):
    engine = to_tensorrt(tiny_graph(), tmp_path, target=target)
    assert [path.name for path in tmp_path.iterdir()] == [engine.file] == ["model.plan"]
    assert (tmp_path / engine.file).stat().st_size > 10_000
    assert engine.requires == {"compute_capability": target or "sm86"}


def test_signed_zero_based_quantization_is_built(tmp_path: Path):
    engine = to_tensorrt(quantized(np.array(0, np.int8)), tmp_path)
    assert (tmp_path / engine.file).stat().st_size > 10_000


@pytest.mark.parametrize(
    ("zero_point", "message"),
    [
        (np.array(0, np.uint8), "the zero point is not INT8"),
        (np.array(3, np.int8), "the zero point is not 0"),
        (None, "no zero point"),
    ],
    ids=["uint8", "asymmetric", "missing"],
)
def test_quantization_that_tensorrt_reads_as_another_is_refused(
    zero_point: np.ndarray | None, message: str, tmp_path: Path
):
    with pytest.raises(ExportError, match=f"quantize_relu.: {message}"):
        to_tensorrt(quantized(zero_point), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_missing_zero_point_is_taken_where_the_type_is_written():
    check_quantization(quantized(None, output_dtype=onnx.TensorProto.INT8).model)


@pytest.mark.parametrize("operator", ["QLinearConv", "MatMulInteger", "DynamicQuantizeLinear"])
def test_operators_that_tensorrt_refuses_are_named(operator: str):
    model = onnx.ModelProto()
    model.CopyFrom(tiny_graph().model)
    model.graph.node[0].op_type = operator
    with pytest.raises(ExportError, match=f"{operator} .*refused"):
        check_quantization(model)


def test_a_warning_about_a_changed_type_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # The check on the graph would stop this one first; the parser's own warning must stop it too.
    monkeypatch.setattr("deploykit.export.to_tensorrt.check_quantization", lambda model: None)
    with pytest.raises(ExportError, match=r"change a type.*INT8"):
        to_tensorrt(quantized(np.array(0, np.uint8)), tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_the_parser_refuses_is_named(tmp_path: Path):
    model = onnx.ModelProto()
    model.CopyFrom(tiny_graph().model)
    model.graph.node[0].op_type = "Strange"
    model.graph.node[0].domain = "nobody.knows"
    model.graph.node[0].name = "strange_node"
    model.opset_import.append(helper.make_opsetid("nobody.knows", 1))
    with pytest.raises(ExportError, match=r"(?s)build for sm86 failed.*strange_node"):
        to_tensorrt(dataclasses.replace(tiny_graph(), model=model), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_build_that_takes_too_long_is_stopped(tmp_path: Path):
    with pytest.raises(ExportError, match=r"more than 0\.05 s"):
        to_tensorrt(tiny_graph(), tmp_path, time_limit=0.05)
    assert not list(tmp_path.iterdir())


def test_a_crash_of_the_builder_is_an_error_with_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = subprocess.run

    def crashing(command: list[str], **options: object) -> object:
        code = f"import os; os.write(2, b'last words'); os.kill(os.getpid(), {int(signal.SIGSEGV)})"
        return run([command[0], "-c", code], **options)

    monkeypatch.setattr("deploykit.export.to_tensorrt.subprocess.run", crashing)
    with pytest.raises(ExportError, match=r"(?s)crashed \(signal 11\).*last words"):
        to_tensorrt(tiny_graph(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_unknown_target_lists_the_known(tmp_path: Path):
    with pytest.raises(ExportError, match="sm86"):
        to_tensorrt(tiny_graph(), tmp_path, target="sm87")
