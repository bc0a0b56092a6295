from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from deploykit.fusion.merge_linears import merge_linears
from tests.fusion.graphs import Calls, calls, check_with_dynamic_batch, few, is_left_alone, rewrites, traced

attend = nn.functional.scaled_dot_product_attention


def part(projected, depth):
    return projected.unflatten(-1, (-1, depth)).transpose(1, 2)


def self_attention(m, x):
    flat = x.flatten(2)
    return attend(part(m.query(flat), 3), part(m.key(flat), 3), part(m.value(flat), 5))


def layers(*, biases=(True, True, True)):
    return {
        name: nn.Linear(144, width, bias=bias)
        for name, width, bias in zip(("query", "key", "value"), (6, 6, 10), biases, strict=True)
    }


@few
@given(biases=st.tuples(st.booleans(), st.booleans(), st.booleans()), seed=st.integers(0, 99))
def test_queries_keys_and_values_of_one_input_become_one_product(biases, seed):
    graph = traced(Calls(self_attention, **layers(biases=biases)))
    assert rewrites(graph, merge_linears, seed) == 2
    assert calls(graph, "linear") == 1
    assert calls(graph, "split_with_sizes") == 1
    (weight,) = (value for name, value in graph.state_dict().items() if name.endswith("weight"))
    assert weight.shape == (22, 144)


def test_cross_attention_merges_keys_and_values():
    def crossed(m, x):
        flat = x.flatten(2)
        return attend(part(m.query(flat.relu()), 3), part(m.key(flat), 3), part(m.value(flat), 5))

    graph = traced(Calls(crossed, **layers()))
    assert rewrites(graph, merge_linears) == 1
    assert calls(graph, "linear") == 2


def test_a_graph_of_any_batch_is_still_traced():
    check_with_dynamic_batch(Calls(self_attention, **layers()), merge_linears)


def _unrelated(m, x):
    flat = x.flatten(2)
    return m.query(flat), m.key(flat)


def _three_inputs(m, x):
    flat = x.flatten(2)
    return attend(part(m.query(flat), 3), part(m.key(flat.relu()), 3), part(m.value(flat.exp()), 5))


def _one_weight(m, x):
    flat = x.flatten(2)
    return attend(part(m.query(flat), 3), part(m.query(flat), 3), part(m.query(flat.relu()), 3))


@pytest.mark.parametrize("function", [_unrelated, _three_inputs, _one_weight])
def test_near_misses_are_left_alone(function):
    assert is_left_alone(Calls(function, **layers()), merge_linears)
