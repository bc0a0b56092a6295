from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest
from torch import nn

from deploykit.calibration.dialect import OnnxDialect
from deploykit.calibration.drop_activations import drop_activations
from deploykit.calibration.quantize_activations import UINT8, quantize_activations
from deploykit.calibration.quantize_weights import quantize_weights
from deploykit.calibration.tidy_graph import tidy_graph
from deploykit.onnx_session import onnx_session
from tests.calibration.networks import master_graph, plan_of, written

IMAGES = np.random.default_rng(0).normal(size=(3, 3, 32, 32)).astype(np.float32)


def dialect_of(*, integer_bias: bool) -> OnnxDialect:
    activations = (quantize_activations(UINT8, writes=True), drop_activations())
    return OnnxDialect(int8=(quantize_weights(integer_bias=integer_bias), *activations, tidy_graph))


def types_of_rank_4(model: ir.Model) -> Counter[ir.DataType | None]:
    return Counter(value.dtype for value in model.graph.initializers.values() if len(value.shape or ()) == 4)


@pytest.mark.parametrize("integer_bias", [False, True])
def test_biases_of_convolutions_are_integers_where_that_is_asked_for(residual, integer_bias):
    model = written(dialect_of(integer_bias=integer_bias), residual.graph, residual.plan)
    biases = [value for value in model.graph.initializers.values() if value.dtype == ir.DataType.INT32]
    assert bool(biases) == integer_bias


def test_a_shared_weight_is_quantized_for_each_of_its_nodes():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.shared = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, images):
            return (self.shared(self.shared(self.stem(images).relu()).relu()),)

    graph = master_graph(Twice(), ("maps",), IMAGES)
    model = written(dialect_of(integer_bias=True), graph, plan_of(graph, IMAGES))
    assert types_of_rank_4(model) == {ir.DataType.INT8: 3}


def test_a_channel_of_zeros_gives_finite_numbers():
    class Silent(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
            nn.init.normal_(self.first.weight)
            nn.init.zeros_(self.first.weight[2:4])
            nn.init.zeros_(self.second.weight)

        def forward(self, images):
            return (self.second(self.first(images).relu()),)

    graph = master_graph(Silent(), ("maps",), IMAGES)
    model = written(dialect_of(integer_bias=True), graph, plan_of(graph, IMAGES))
    (found,) = onnx_session(model).run(None, {"images": IMAGES[:1]})
    (expected,) = onnx_session(graph.model).run(None, {"images": IMAGES[:1]})
    np.testing.assert_allclose(found, expected, atol=2e-3)


def test_a_convolution_without_bias_gets_the_correction():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.only = nn.Conv2d(3, 8, 3, bias=False)

        def forward(self, images):
            return (self.only(images),)

    graph = master_graph(Bare(), ("maps",), IMAGES + 1)
    plan = plan_of(graph, IMAGES + 1)
    model = written(dialect_of(integer_bias=False), graph, plan)
    (convolution,) = (node for node in model.graph if node.op_type == "Conv")
    bias = convolution.inputs[2].const_value.numpy()
    (shift,) = plan.bias_shift.values()
    np.testing.assert_allclose(bias, shift)
    assert np.abs(shift).max() > 0


def test_operators_of_another_pass_keep_their_float_weights(tokens):
    passes = (quantize_weights(integer_bias=False, dynamic_operators=frozenset(("MatMul", "Gemm"))),)
    model = written(OnnxDialect(int8=passes), tokens.graph, tokens.plan)
    dequantized = {node.op_type for node in model.graph if _reads_integers(node)}
    assert dequantized == {"Conv"}


def _reads_integers(node: ir.Node) -> bool:
    weight = node.inputs[1].producer() if len(node.inputs) > 1 and node.inputs[1] is not None else None
    return weight is not None and weight.op_type == "DequantizeLinear"
