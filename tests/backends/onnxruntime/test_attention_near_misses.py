"""Attentions that differ in one thing from those that `fuse_attention` takes: each stays as it is."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch

from deploykit.backends.onnxruntime.fuse_attention import fuse_attention
from tests.backends.onnxruntime.test_fuse_attention import DEPTH, HEADS, attend, graph_of, merge, network, ours
from tests.fusion.graphs import DYNAMIC
from tests.fusion.onnx_graphs import is_left_alone


@pytest.fixture(scope="module")
def whole() -> ir.Model:
    """A graph whose attention has a constant bias and a scale, and is taken."""
    bias = torch.randn(HEADS, 4, 4, generator=torch.Generator().manual_seed(0))
    module = network(lambda m, projected: merge(attend(*ours(projected), m.bias, scale=0.3)), bias=bias)
    model = graph_of(module, DYNAMIC)
    assert fuse_attention(model.clone()) == 1
    return model


def node_of(model: ir.Model, kind: str) -> ir.Node:
    return next(node for node in model.graph if node.op_type == kind)


def constant(model: ir.Model, array: np.ndarray) -> ir.Value:
    found = ir.Value(name="other", const_value=ir.tensor(array, name="other"))
    found.shape, found.dtype = ir.Shape(array.shape), ir.DataType.FLOAT
    model.graph.register_initializer(found)
    return found


def read_through(model: ir.Model, node: ir.Node, place: int) -> None:
    """Let a node read the negative of what it reads."""
    value = node.inputs[place]
    negative = ir.node("Neg", [value], name="between")
    negative.outputs[0].shape, negative.outputs[0].type = value.shape, value.type
    model.graph.insert_before(node, negative)
    node.replace_input_with(place, negative.outputs[0])


def softmax(model):
    return node_of(model, "Softmax")


def scores(model):
    return softmax(model).inputs[0].producer()


def product(model):
    """The scores' own product, before the bias."""
    return next(value.producer() for value in scores(model).inputs if value.producer() is not None)


def projection(model):
    """The addition that ends the joint projection."""
    return next(node for node in model.graph if any(value.name == "qkv.bias" for value in node.inputs if value))


def another_axis(model):
    softmax(model).attributes["axis"] = ir.AttrInt64("axis", 2)


def bias_of_rank_2(model):
    place = 1 if scores(model).inputs[1].producer() is None else 0
    scores(model).replace_input_with(place, constant(model, np.ones((4, 4), np.float32)))


def bias_of_the_sample(model):
    place = 1 if scores(model).inputs[1].producer() is None else 0
    scores(model).replace_input_with(place, constant(model, np.ones((2, HEADS, 4, 4), np.float32)))


def scores_of_no_product(model):
    read_through(model, scores(model), [value.producer() for value in scores(model).inputs].index(product(model)))


def a_scale_for_each_channel(model):
    scaling = product(model).inputs[0].producer()
    assert scaling.op_type == "Mul"
    scaling.replace_input_with(1, constant(model, np.linspace(0.1, 0.9, DEPTH, dtype=np.float32)))


def a_projection_of_unknown_size(model):
    result = projection(model).outputs[0]
    result.shape = ir.Shape([result.shape[0], None, result.shape[2]])


def a_bias_of_rank_2(model):
    node = projection(model)
    place = [value.name for value in node.inputs].index("qkv.bias")
    node.replace_input_with(place, constant(model, np.ones((1, 24), np.float32)))


def a_computed_weight(model):
    matmul = next(value.producer() for value in projection(model).inputs if value.producer() is not None)
    read_through(model, matmul, 1)


def computed_values(model):
    attended = next(use.node for use in softmax(model).outputs[0].uses())
    read_through(model, attended, 1)


def attended_of_unknown_size(model):
    attended = next(use.node for use in softmax(model).outputs[0].uses())
    attended.outputs[0].shape = None


CHANGES = (
    *(another_axis, bias_of_rank_2, bias_of_the_sample, scores_of_no_product, a_scale_for_each_channel),
    *(a_projection_of_unknown_size, a_bias_of_rank_2, a_computed_weight, computed_values, attended_of_unknown_size),
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.replace("_", " "))
def test_one_difference_leaves_it_alone(whole, change):
    model = whole.clone()
    change(model)
    assert is_left_alone(fuse_attention, model)
