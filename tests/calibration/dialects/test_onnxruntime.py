from __future__ import annotations

from collections import Counter

import onnx
import onnxruntime
import pytest

from deploykit.calibration.dialects.onnxruntime import STYLE, render
from deploykit.calibration.half import HalfPlan
from deploykit.calibration.precision import Bf16Plan
from deploykit.errors import ExportError
from deploykit.graph import Graph
from tests.calibration.networks import rounding_noise_db

INTEGER_KERNELS = ("QLinearConv", "QLinearAdd", "QGemm", "MaxPool")


@pytest.fixture
def optimized(case, tmp_path) -> onnx.ModelProto:
    """What ONNX Runtime makes of the dialect's graph."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    model = render(case.graph, case.plan).model
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return onnx.load(tmp_path / "optimized.onnx")


def test_every_planned_convolution_runs_in_integers(case, optimized):
    kinds = Counter(node.op_type for node in optimized.graph.node)
    placement = STYLE.as_rendered(case.graph.model, case.plan).placement
    planned = sum(
        1 for node in case.graph.model.graph.node if node.op_type == "Conv" and node.name in placement.weights
    )
    assert kinds["QLinearConv"] == planned >= 7
    assert kinds["Conv"] + kinds["FusedConv"] == len(placement.float_nodes)


def test_no_float_stands_between_two_integer_kernels(optimized):
    writers = {output: node for node in optimized.graph.node for output in node.output}
    readers = {}
    for node in optimized.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    islands = []
    for node in optimized.graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] not in writers:
            continue
        if writers[node.input[0]].op_type in INTEGER_KERNELS:
            islands += [node.name for reader in readers.get(node.output[0], []) if reader.op_type == "QuantizeLinear"]
    assert not islands


def test_residual_adds_and_max_pools_run_in_integers(residual, tmp_path):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    model = render(residual.graph, residual.plan).model
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(tmp_path / "optimized.onnx").graph.node
    kinds = Counter(node.op_type for node in nodes)
    assert kinds["QLinearAdd"] == 2
    assert kinds["Add"] == kinds["Relu"] == 0
    (pool,) = (node for node in nodes if node.op_type == "MaxPool")
    assert "restored" not in pool.input[0]


def test_the_numbers_stay_near_fp32(case):
    rendered = render(case.graph, case.plan)
    assert rendered.program is None
    assert min(rounding_noise_db(case.run(), case.run(rendered.model))) > 12


def test_a_graph_without_onnx_and_a_plan_of_another_precision_are_refused(residual):
    with pytest.raises(ExportError, match="no ONNX form"):
        render(Graph(input=residual.graph.input, outputs=()), None)
    with pytest.raises(ExportError, match="Bf16Plan"):
        render(residual.graph, Bf16Plan())


def test_fp32_is_the_master_itself_and_half_keeps_float_inputs_and_outputs(residual):
    assert render(residual.graph, None).model is residual.graph.model
    kept = next(iter(residual.plan.placement.weights.values())).weight
    model = render(residual.graph, HalfPlan(float_weights={kept: 0.0})).model
    onnx.checker.check_model(model)
    values = (*model.graph.input, *model.graph.output)
    assert {value.type.tensor_type.elem_type for value in values} == {onnx.TensorProto.FLOAT}
    types = Counter(tensor.data_type for tensor in model.graph.initializer if len(tensor.dims) == 4)
    assert types[onnx.TensorProto.FLOAT] == 1
    assert types[onnx.TensorProto.FLOAT16] == 8
    assert min(rounding_noise_db(residual.run(), residual.run(model))) > 45


def test_every_linear_layer_of_a_transformer_runs_in_integers(tokens, tmp_path):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    model = render(tokens.graph, tokens.plan).model
    onnx.checker.check_model(model, full_check=True)
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    optimized = onnx.load(tmp_path / "optimized.onnx").graph
    kinds = Counter(node.op_type for node in optimized.node)
    assert kinds["DynamicQuantizeMatMul"] + kinds["Attention"] == len(tokens.plan.placement.weights) - 1 == 9
    assert kinds["Attention"] == 2
    assert kinds["MatMulIntegerToFloat"] == 6
    assert kinds["Conv"] == 1
    constants = {tensor.name for tensor in optimized.initializer}
    products = [node for node in optimized.node if "MatMul" in node.op_type or node.op_type == "Gemm"]
    in_integers = {"DynamicQuantizeMatMul", "MatMulIntegerToFloat"}
    in_float = [node for node in products if node.op_type not in in_integers and set(node.input) & constants]
    assert not in_float
    assert min(rounding_noise_db(tokens.run(), tokens.run(model))) > 25
