"""LiteRT's INT8: every planned operator in integers, with the plan's own, and the numbers that the plan gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deploykit.backbones.attention import TransformerBlock
from deploykit.backends.litert.flatbuffer import WEIGHTED, TFLiteModel
from deploykit.backends.litert.inspect import left_in_float
from deploykit.backends.litert.integer_weights import IntegerWeight, check_integers, write_integers
from deploykit.backends.litert.passes import DIALECT
from deploykit.errors import ExportError
from deploykit.onnx_values import array_of
from tests.backends.integer_engine import IntegerEngine, integer_engine, losses
from tests.calibration.conftest import Case
from tests.calibration.networks import Tokens, master_of, plan_of
from tests.conftest_graphs import engine_of


class Transformer(Tokens):
    """Two blocks with weights of their own, into which what stands beside them is folded."""

    def __init__(self) -> None:
        super().__init__()
        self.second = TransformerBlock(48, 4)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        tokens = self.norm(self.second(self.block(self.patches(images).flatten(2).transpose(1, 2))))
        return tokens, self.head(tokens.mean(1))


@pytest.fixture(scope="module")
def transformer(tokens: Case) -> Case:
    """Its graph, its plan and its images."""
    master = master_of(Transformer, tokens.images)
    plan = plan_of(master.onnx, tokens.images)
    return Case(graph=master.onnx, program=master.torch, images=tokens.images, plan=plan)


@pytest.fixture(scope="module", params=["residual", pytest.param("transformer", marks=pytest.mark.slow)])
def exported(request) -> IntegerEngine:
    """A network of convolutions and one of linears, in the same plan as elsewhere."""
    return integer_engine("litert", request.getfixturevalue(request.param), request.param)


def test_every_planned_operator_runs_in_integers(exported: IntegerEngine):
    found = left_in_float(exported.file)
    floats = sum(count for operator, count in found.items() if operator.startswith("float "))
    assert floats == len(exported.plan.placement.float_nodes)
    assert all("few channels" in reason for reason in exported.plan.placement.float_nodes.values())


def test_the_integers_in_the_file_are_the_plans(exported: IntegerEngine):
    model, weights = TFLiteModel(exported.file.read_bytes()), exported.case.graph.model.graph.initializers
    stored = set()
    for operator in model.operators():
        if operator.name in WEIGHTED and model.is_integer(operator.graph, operator.inputs[1]):
            tensor = operator.graph.tensors[operator.inputs[1]]
            stored.add((model.constant(tensor).tobytes(), np.asarray(tensor.quantization.scale, np.float32).tobytes()))
    for name, use in exported.plan.placement.weights.items():
        integers, scales = exported.plan.integers_of(name, array_of(weights[use.weight]), use.axis)
        if use.axis == 1:
            integers = np.ascontiguousarray(integers.T)
        planned = IntegerWeight(name=name, integers=integers, scales=scales, dynamic=False)
        assert (planned.stored(), scales.tobytes()) in stored, name


def test_it_gives_what_the_same_plan_gives_in_an_unoptimized_graph(exported: IntegerEngine):
    assert all(loss <= 1 for loss in losses(exported))


def test_an_operator_that_stayed_in_float_is_named():
    manifest, folder = engine_of("litert")
    planned = IntegerWeight(
        name="conv2d_1", integers=np.ones((16, 8, 3, 3), np.int8), scales=np.ones(16, np.float32), dynamic=False
    )
    with pytest.raises(ExportError, match=r"left conv2d_1 in float.*another runtime"):
        check_integers((folder / manifest.engine).read_bytes(), [planned])


def test_a_linear_that_the_converter_changed_is_named():
    manifest, folder = engine_of("litert")
    content = (folder / manifest.engine).read_bytes()
    planned = IntegerWeight(
        name="linear", integers=np.ones((10, 16), np.int8), scales=np.ones(10, np.float32), dynamic=True
    )
    with pytest.raises(ExportError, match=r"left linear in float"):
        check_integers(write_integers(content, [planned]), [planned])


def test_every_reader_of_integers_has_a_dq_of_its_own(residual: Case):
    program = DIALECT.render(residual.program, residual.plan, residual.images).graph.program
    operators = torch.ops.quantized_decomposed
    restored = [n for n in program.graph.nodes if n.target == operators.dequantize_per_tensor.default]
    written = [n for n in program.graph.nodes if n.target == operators.quantize_per_tensor.default]
    assert len(restored) > len(written) > 8
    assert all(len(node.users) == 1 for node in restored)
    assert all(node.args[3:5] == (-128, 127) for node in restored)
