from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deploykit.fusion.fold_attention_scale import scale_of
from deploykit.fusion.fold_constants import fold_constants
from deploykit.fusion.fuse_attention import fuse_attention
from tests.fusion.graphs import Calls, calls, check_with_dynamic_batch, few, is_left_alone, rewrites, traced

DEPTH = 6
SCALE = DEPTH**-0.5
MASK = torch.ones(12, 12).tril().bool()

SCORES = {
    "queries times": lambda q, k: (q * SCALE) @ k.transpose(-2, -1),
    "queries over": lambda q, k: (q / math.sqrt(DEPTH)) @ k.transpose(-1, -2),
    "both": lambda q, k: (q * DEPTH**-0.25) @ (k * DEPTH**-0.25).mT,
    "scores times": lambda q, k: torch.matmul(q, k.permute(0, 1, 3, 2)) * SCALE,
    "scores first": lambda q, k: SCALE * (q @ k.transpose(-2, -1)),
    "scores over": lambda q, k: q @ k.transpose(2, 3) / math.sqrt(DEPTH),
    "keys given transposed": lambda q, k: q @ (k.reshape(-1, 2, 6, 12) * SCALE),
    "keys over": lambda q, k: q @ (k.transpose(2, 3) / math.sqrt(DEPTH)),
}
BIASES = {
    "none": lambda m, scores: scores,
    "added": lambda m, scores: scores + m.bias,
    "added first": lambda m, scores: m.bias + scores,
    "filled": lambda m, scores: scores.masked_fill(~m.mask, -math.inf),
    "filled with the least": lambda m, scores: scores.masked_fill(~m.mask, torch.finfo(torch.float32).min),
    "where": lambda m, scores: torch.where(m.mask, scores, -math.inf),
}


def heads(x):
    """Queries, keys and values ``(N, 2, 12, 6)`` of images."""
    return x[:, :2, :, :6], x[:, 2:, :, :6].relu(), x[:, :2, :, 6:].exp()


def parts():
    return {"bias": torch.randn(2, 12, 12, generator=torch.Generator().manual_seed(0)), "mask": MASK}


@few
@given(
    scores=st.sampled_from(sorted(SCORES)),
    bias=st.sampled_from(sorted(BIASES)),
    axis=st.sampled_from([-1, 3]),
    seed=st.integers(0, 99),
)
def test_the_usual_spellings_become_one_operator(*, scores, bias, axis, seed):
    def network(m, x):
        query, key, value = heads(x)
        return BIASES[bias](m, SCORES[scores](query, key)).softmax(axis) @ value

    graph = traced(Calls(network, **parts()))
    fold_constants(graph)
    assert rewrites(graph, fuse_attention, seed) == 1
    assert calls(graph, "matmul", "softmax", "mul", "div", "masked_fill", "where", "add") == 0
    (attention,) = (node for node in graph.graph.nodes if "scaled_dot" in str(node.target))
    assert scale_of(attention) == pytest.approx(SCALE)


@pytest.mark.parametrize(
    ("scores", "bias"), [*((name, "none") for name in SCORES), *(("queries times", name) for name in BIASES)]
)
def test_each_spelling_of_scores_and_of_biases_is_known(scores, bias):
    def network(m, x):
        query, key, value = heads(x)
        return BIASES[bias](m, SCORES[scores](query, key)).softmax(-1) @ value

    graph = traced(Calls(network, **parts()))
    fold_constants(graph)
    assert rewrites(graph, fuse_attention) == 1


def test_a_graph_of_any_batch_is_still_traced():
    def network(m, x):
        query, key, value = heads(x)
        return (query @ key.mT + m.bias).softmax(-1) @ value

    check_with_dynamic_batch(Calls(network, **parts()), fuse_attention)


NEAR_MISSES = {
    "another axis": lambda m, q, k, v: (q @ k.mT).softmax(-2) @ v,
    "no softmax": lambda m, q, k, v: (q @ k.mT).sigmoid() @ v,
    "probabilities are read": lambda m, q, k, v: _read(lambda p: (p @ v, p), (q @ k.mT).softmax(-1)),
    "scores are read": lambda m, q, k, v: _read(lambda s: (s.softmax(-1) @ v, s), q @ k.mT),
    "factor outside the bias": lambda m, q, k, v: ((q @ k.mT + m.bias) * 2).softmax(-1) @ v,
    "tensor factor": lambda m, q, k, v: (q @ k.mT * m.bias).softmax(-1) @ v,
    "finite fill": lambda m, q, k, v: (q @ k.mT).masked_fill(m.mask, -3.0).softmax(-1) @ v,
    "rank 3": lambda m, q, k, v: (q[:, 0] @ k[:, 0].mT).softmax(-1) @ v[:, 0],
    "heads are shared": lambda m, q, k, v: (q @ k[:, :1].mT).softmax(-1) @ v,
    "mask of the images": lambda m, q, k, v: (q @ k.mT).masked_fill(q @ k.mT > 1, -math.inf).softmax(-1) @ v,
    "a query that sees nothing": lambda m, q, k, v: (q @ k.mT).masked_fill(m.mask, -math.inf).softmax(-1) @ v,
    "tensor divisor": lambda m, q, k, v: (q @ k.mT / m.bias).softmax(-1) @ v,
    "a bias of what is no product": lambda m, q, k, v: ((q @ k.mT).exp() + m.bias).softmax(-1) @ v,
    "a bias of rank 1": lambda m, q, k, v: (q @ k.mT + m.bias[0, 0]).softmax(-1) @ v,
    "weighted bias": lambda m, q, k, v: torch.add(q @ k.mT, m.bias, alpha=2).softmax(-1) @ v,
}


def _read(function, value):
    return function(value)


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_are_left_alone(name):
    module = Calls(lambda m, x: NEAR_MISSES[name](m, *heads(x)), **parts())
    graph = traced(module)
    assert fuse_attention(graph) == 0
    assert calls(graph, "matmul") >= 2
    if name != "a query that sees nothing":
        assert is_left_alone(module, fuse_attention)
