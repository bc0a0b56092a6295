from __future__ import annotations

from collections import Counter
from dataclasses import replace

import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from deploykit.backends.onnxruntime.passes import DIALECT
from deploykit.calibration.half import HalfPlan
from tests.calibration.networks import rounding_noise_db

INTEGER_KERNELS = ("QLinearConv", "QLinearAdd", "QGemm", "MaxPool")


def rendered(case) -> ir.Model:
    return DIALECT.render(case.graph, case.plan, case.images).graph.model


def serialized(model: ir.Model) -> bytes:
    return ir.to_proto(model).SerializeToString()


@pytest.fixture
def optimized(case, tmp_path) -> onnx.ModelProto:
    """What ONNX Runtime makes of the dialect's graph."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    onnxruntime.InferenceSession(serialized(rendered(case)), options, providers=["CPUExecutionProvider"])
    return onnx.load(tmp_path / "optimized.onnx")


def test_every_planned_convolution_runs_in_integers(case, optimized):
    kinds = Counter(node.op_type for node in optimized.graph.node)
    placement = DIALECT.keep_float(case.graph.model, case.plan).placement
    planned = sum(1 for node in case.graph.model.graph if node.op_type == "Conv" and node.name in placement.weights)
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
    onnxruntime.InferenceSession(serialized(rendered(residual)), options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(tmp_path / "optimized.onnx").graph.node
    kinds = Counter(node.op_type for node in nodes)
    assert kinds["QLinearAdd"] == 2
    assert kinds["Add"] == kinds["Relu"] == 0
    (pool,) = (node for node in nodes if node.op_type == "MaxPool")
    assert "restored" not in pool.input[0]


def test_the_numbers_stay_near_fp32(case):
    assert min(rounding_noise_db(case.run(), case.run(rendered(case)))) > 12


def test_fp32_is_the_master_itself_and_half_keeps_float_inputs_and_outputs(residual):
    dialect = replace(DIALECT, optimize=())
    assert dialect.render(residual.graph, None, residual.images).graph.model is residual.graph.model
    kept = next(iter(residual.plan.placement.weights.values())).weight
    plan = HalfPlan(float_weights={kept: 0.0})
    model = dialect.render(residual.graph, plan, residual.images).graph.model
    onnx.checker.check_model(ir.to_proto(model))
    assert {value.dtype for value in (*model.graph.inputs, *model.graph.outputs)} == {ir.DataType.FLOAT}
    types = Counter(tensor.data_type for tensor in ir.to_proto(model).graph.initializer if len(tensor.dims) == 4)
    assert types[onnx.TensorProto.FLOAT] == 1
    assert types[onnx.TensorProto.FLOAT16] == 8
    assert min(rounding_noise_db(residual.run(), residual.run(model))) > 45


def test_every_linear_layer_of_a_transformer_runs_in_integers(tokens, tmp_path):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    model = rendered(tokens)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    onnxruntime.InferenceSession(serialized(model), options, providers=["CPUExecutionProvider"])
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
