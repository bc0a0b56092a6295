from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from deploykit.fusion import fold_constants as subject
from deploykit.fusion.fold_constants import fold_constants
from tests.fusion.graphs import Calls, calls, check_with_dynamic_batch, few, images, targets, traced, vector


@few
@given(
    side=st.integers(1, 4),
    heads=st.integers(1, 3),
    masked=st.booleans(),
    seed=st.integers(0, 9),
)
def test_a_position_bias_with_a_mask_becomes_one_constant(*, side, heads, masked, seed):
    index = torch.randint(0, 5, (side * side,), generator=torch.Generator().manual_seed(seed))

    def biased(m, x):
        bias = m.table[m.index].reshape(side, side, heads).permute(2, 0, 1)
        if masked:
            bias = bias.masked_fill(torch.arange(side)[:, None] > torch.arange(side), -100.0)
        return x.mean((1, 2, 3), keepdim=True) + bias.unsqueeze(0)

    graph = traced(Calls(biased, table=vector(5, heads, seed=seed), index=index))
    (expected,) = graph(images())
    assert fold_constants(graph) > 0
    assert targets(graph) == ["aten.mean.dim", "aten.add.Tensor"]
    assert torch.equal(graph(images())[0], expected)


def test_a_weight_that_is_standardized_on_the_way_becomes_a_weight():
    def standardized(m, x):
        weight = m.conv.weight
        centred = weight - weight.mean((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, centred / centred.std((1, 2, 3), keepdim=True), m.conv.bias)

    module = Calls(standardized, conv=nn.Conv2d(4, 4, 3))
    graph = traced(module)
    fold_constants(graph)
    assert targets(graph) == ["aten.conv2d.default"]
    assert len(list(graph.parameters())) == 2, "the weight that nothing reads any more is gone"
    check_with_dynamic_batch(module, fold_constants)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x * m.scale,
        lambda m, x: x * (m.scale + x.mean()),
        lambda _, x: x + torch.rand(12),
        lambda m, x: x * nn.functional.dropout(m.scale, 0.5, training=True),
    ],
    ids=["a constant as it is", "made of the images", "random", "dropout of training"],
)
def test_near_misses_are_left_alone(function):
    graph = traced(Calls(function, scale=vector(12)))
    before, held = targets(graph), set(graph.state_dict())
    assert fold_constants(graph) == 0
    assert targets(graph) == before
    assert set(graph.state_dict()) <= held


def test_a_cheap_operator_makes_no_giant_constant(monkeypatch):
    monkeypatch.setattr(subject, "MAX_BYTES", 1000)
    wide = Calls(lambda m, x: x.mean() + (m.scale.sin() + torch.ones(64, 12)).sum(0), scale=vector(12))
    graph = traced(wide)
    fold_constants(graph)
    assert calls(graph, "add") == 2
    assert calls(graph, "sin") == 0, "what is small before it is still evaluated"
    assert max(value.numel() for value in graph.state_dict().values()) <= 12


def test_a_constant_no_larger_than_what_it_is_made_of_is_made(monkeypatch):
    monkeypatch.setattr(subject, "MAX_BYTES", 8)
    graph = traced(Calls(lambda m, x: x @ m.weight.t(), weight=vector(5, 12)))
    assert fold_constants(graph) == 1
    assert targets(graph) == ["aten.matmul.default"]


def test_a_graph_that_writes_in_place_is_left_alone():
    def counted(m, x):
        m.total.add_(1)
        return x * (m.total + 1)

    graph = traced(Calls(counted, total=torch.zeros(())))
    assert fold_constants(graph) == 0
    assert calls(graph, "add_", "add") == 2
