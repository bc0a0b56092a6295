from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from deploykit.fusion.fold_attention_scale import fold_attention_scale, scale_of
from tests.fusion.graphs import Calls, check_with_dynamic_batch, few, is_left_alone, layer_norm, rewrites, traced

HEADS, DEPTH = 2, 3
WIDTH = HEADS * DEPTH
attend = nn.functional.scaled_dot_product_attention


def tokens(x):
    return x.flatten(2)  # (N, 4, 144)


def heads_then_parts(projected):
    return projected.reshape(-1, 4, 3 * HEADS, DEPTH).transpose(1, 2).chunk(3, dim=1)


def parts_then_heads(projected):
    return projected.reshape(-1, 4, 3, HEADS, DEPTH).permute(2, 0, 3, 1, 4).unbind(0)


def selected(projected):
    parts = projected.reshape(-1, 4, 3, HEADS, DEPTH).permute(2, 0, 3, 1, 4)
    return parts[0], parts[1], parts[2]


def split(projected):
    return [part.unflatten(-1, (HEADS, DEPTH)).transpose(1, 2) for part in projected.split(WIDTH, -1)]


def interleaved(projected):
    parts = projected.reshape(-1, 4, HEADS, DEPTH, 3).permute(4, 0, 2, 1, 3)
    return parts[0], parts[1], parts[2]


def sliced(projected):
    query, key, value = heads_then_parts(projected)
    return query[:, :, :1], key, value


LAYOUTS = [heads_then_parts, parts_then_heads, selected, split, interleaved, sliced]


def attentions(graph):
    return [node for node in graph.graph.nodes if "scaled_dot_product" in str(node.target)]


@few
@given(
    layout=st.sampled_from(LAYOUTS),
    scale=st.sampled_from([None, 0.3, -2.0]),
    bias=st.booleans(),
    mask=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_scale_goes_into_the_rows_of_the_queries_alone(*, layout, scale, bias, mask, seed):
    def network(m, x):
        query, key, value = layout(m.qkv(tokens(x)))
        return attend(query, key, value, m.mask if mask else None, scale=scale)

    qkv = nn.Linear(144, 3 * WIDTH, bias=bias)
    graph = traced(Calls(network, qkv=qkv, mask=torch.randn(1, 1, 1, 4)))
    assert rewrites(graph, fold_attention_scale, seed) == 1
    assert [scale_of(node) for node in attentions(graph)] == [1.0]
    unchanged = (graph.state_dict()["qkv.weight"] == qkv.weight).all(dim=1)
    assert unchanged.sum() == 2 * WIDTH


def test_queries_of_a_layer_of_their_own_and_of_a_convolution():
    def separate(m, x):
        flat = tokens(x)
        return attend(*(layer(flat).unflatten(-1, (HEADS, DEPTH)).transpose(1, 2) for layer in m.layers))

    def convolved(m, x):
        return attend(*m.conv(x).flatten(2).unflatten(1, (3, HEADS, DEPTH)).transpose(-1, -2).unbind(1))

    layers = nn.ModuleList(nn.Linear(144, WIDTH) for _ in range(3))
    assert rewrites(traced(Calls(separate, layers=layers)), fold_attention_scale) == 1
    assert rewrites(traced(Calls(convolved, conv=nn.Conv2d(4, 3 * WIDTH, 3))), fold_attention_scale) == 1


def test_a_graph_of_any_batch_is_still_traced():
    module = Calls(lambda m, x: attend(*heads_then_parts(m.qkv(tokens(x)))), qkv=nn.Linear(144, 3 * WIDTH))
    check_with_dynamic_batch(module, fold_attention_scale)


def _read_elsewhere(m, x):
    query, key, value = heads_then_parts(m.qkv(tokens(x)))
    return attend(query, key, value), query.mean()


def _keys_are_queries(m, x):
    query, _, value = heads_then_parts(m.qkv(tokens(x)))
    return attend(query, query, value)


def _overlapping(m, x):
    query, key, value = heads_then_parts(m.qkv(tokens(x)))
    return attend(torch.roll(query, 1, 1), torch.cat((query[:, :1], key[:, 1:]), 1), value)


def _normalized(m, x):
    query, key, value = heads_then_parts(m.qkv(tokens(x)))
    return attend(m.norm(query), key, value)


def _scaled_already(m, x):
    return attend(*heads_then_parts(m.qkv(tokens(x))), scale=1.0)


def _shared(m, x):
    return attend(*heads_then_parts(m.qkv(tokens(x)))), m.qkv(tokens(x.relu()))


@pytest.mark.parametrize(
    "function", [_read_elsewhere, _keys_are_queries, _overlapping, _normalized, _scaled_already, _shared]
)
def test_near_misses_are_left_alone(function):
    module = Calls(function, qkv=nn.Linear(144, 3 * WIDTH), norm=layer_norm(DEPTH))
    assert is_left_alone(module, fold_attention_scale)
