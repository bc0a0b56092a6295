from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from deploykit.fusion.fold_layernorm import fold_layernorm
from tests.fusion.graphs import Calls, check_with_dynamic_batch, few, is_left_alone, layer_norm, rewrites, traced


def norms(graph):
    return [node for node in graph.graph.nodes if str(node.target) == "aten.layer_norm.default"]


@few
@given(
    readers=st.integers(1, 3),
    bias=st.booleans(),
    norm_bias=st.booleans(),
    zeros=st.booleans(),
    seed=st.integers(0, 99),
)
def test_gain_and_shift_go_into_every_linear_that_reads(*, readers, bias, norm_bias, zeros, seed):
    norm = layer_norm(12, seed, bias=norm_bias)
    if zeros:
        nn.init.zeros_(norm.weight[3:5])
    linears = nn.ModuleList(nn.Linear(12, 5, bias=bias) for _ in range(readers))
    module = Calls(_apply, norm=norm, linears=linears)
    graph = traced(module)
    assert rewrites(graph, fold_layernorm, seed) == 1
    assert norms(graph)[0].args[2:4] == (None, None)


def _apply(m, x):
    normed = m.norm(x)
    return tuple(linear(normed) for linear in m.linears)


def test_a_graph_of_any_batch_is_still_traced():
    check_with_dynamic_batch(
        Calls(_apply, norm=layer_norm(12), linears=nn.ModuleList([nn.Linear(12, 5)])), fold_layernorm
    )


def test_a_norm_that_is_called_twice_is_folded_into_each_reader():
    module = Calls(
        lambda m, x: (m.first(m.norm(x)), m.second(m.norm(x.relu()))),
        norm=layer_norm(12),
        first=nn.Linear(12, 5),
        second=nn.Linear(12, 5),
    )
    assert rewrites(traced(module), fold_layernorm) == 2


@pytest.mark.parametrize(
    "module",
    [
        Calls(lambda m, x: (m.norm(x),), norm=layer_norm(12)),
        Calls(lambda m, x: _residual(m, m.norm(x)), norm=layer_norm(12), linear=nn.Linear(12, 12)),
        Calls(lambda m, x: m.linear(m.norm(x).transpose(2, 3)), norm=layer_norm(12), linear=nn.Linear(12, 5)),
        Calls(lambda m, x: m.linear(m.norm(x)), norm=nn.LayerNorm((12, 12)), linear=nn.Linear(12, 5)),
        Calls(lambda m, x: m.linear(m.norm(x)), norm=layer_norm(12, elementwise_affine=False), linear=nn.Linear(12, 5)),
        Calls(lambda m, x: m.linear(m.norm(x)) + m.linear(x), norm=layer_norm(12), linear=nn.Linear(12, 5)),
        Calls(lambda m, x: m.norm(x) @ m.linear.weight.t(), norm=layer_norm(12), linear=nn.Linear(12, 5)),
    ],
    ids=["no reader", "residual", "permuted", "two axes", "no affine part", "shared weight", "no linear"],
)
def test_near_misses_are_left_alone(module):
    assert is_left_alone(module, fold_layernorm)


def _residual(m, normed):
    return normed + m.linear(normed)
