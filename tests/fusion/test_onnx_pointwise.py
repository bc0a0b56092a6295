from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from deploykit.fusion import onnx_pointwise
from deploykit.fusion.onnx_pointwise import convolve_last_layers, convolve_mlps
from tests.fusion.graphs import DYNAMIC, SPEC
from tests.fusion.onnx_graphs import counts, fewer, graph_of, is_left_alone, rewritten


def parts(hidden: int = 8, act: type[nn.Module] = nn.GELU) -> dict:
    return {
        "conv": nn.Conv2d(4, 4, 3, padding=1, groups=4),
        "one": nn.Linear(4, hidden),
        "act": act(),
        "two": nn.Linear(hidden, 4),
    }


def block(m, x):
    mixed = m.conv(x).permute(0, 2, 3, 1)
    return x + m.two(m.act(m.one(mixed))).permute(0, 3, 1, 2)


@fewer
@given(
    hidden=st.sampled_from([1, 5, 16]),
    act=st.sampled_from([nn.GELU, nn.ReLU, nn.Hardswish, nn.Sigmoid]),
    spec=st.sampled_from([SPEC, DYNAMIC]),
)
def test_an_mlp_between_maps_becomes_convolutions(hidden, act, spec):
    before = graph_of(block, spec, **parts(hidden, act))
    written, after = rewritten(convolve_mlps, before)
    assert written == 1
    assert (counts(after)["Conv"], counts(after)["MatMul"], counts(after)["Transpose"]) == (3, 0, 2)
    written, after = rewritten(convolve_last_layers, before)
    assert written == 1
    assert (counts(after)["Conv"], counts(after)["MatMul"], counts(after)["Transpose"]) == (2, 1, 2)


@pytest.mark.parametrize("rewrite", [convolve_mlps, convolve_last_layers])
@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x + m.two(m.act(m.one(x.permute(0, 2, 3, 1)))).permute(0, 3, 2, 1),
        lambda m, x: (y := m.two(m.act(m.one(x.permute(0, 2, 3, 1))))).permute(0, 3, 1, 2) + y.mean(),
        lambda m, x: x + nn.functional.linear(m.act(m.one(x.permute(0, 2, 3, 1))), m.two.weight).permute(0, 3, 1, 2),
        lambda m, x: x + m.two(m.act(m.one(x.permute(0, 2, 3, 1)))).softmax(-1).permute(0, 3, 1, 2),
        lambda m, x: x + m.conv(x),
    ],
    ids=["another permutation", "read twice", "no bias", "softmax between", "no layer"],
)
def test_near_misses_are_left_alone(rewrite, function):
    assert is_left_alone(rewrite, graph_of(function, SPEC, **parts()))


def test_one_layer_is_no_mlp():
    def single(m, x):
        return x + m.two(m.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    before = graph_of(single, SPEC, **parts() | {"two": nn.Linear(4, 4)})
    assert is_left_alone(convolve_mlps, before)
    assert rewritten(convolve_last_layers, before)[0] == 1


def test_a_hidden_layer_that_something_else_reads_keeps_the_mlp():
    def normalised(m, x):
        hidden = m.act(m.one(x.permute(0, 2, 3, 1)))
        return x + m.two(hidden / hidden.mean()).permute(0, 3, 1, 2)

    before = graph_of(normalised, SPEC, **parts())
    assert is_left_alone(convolve_mlps, before)
    assert rewritten(convolve_last_layers, before)[0] == 1


@pytest.mark.parametrize("spec", [SPEC, DYNAMIC])
def test_an_mlp_on_large_maps_becomes_convolutions_between_two_permutations(monkeypatch, spec):
    def residual(m, x):
        tokens = x.permute(0, 2, 3, 1)
        return tokens + m.two(m.act(m.one(tokens * 2)))

    before = graph_of(residual, spec, **parts())
    assert is_left_alone(convolve_mlps, before)
    monkeypatch.setattr(onnx_pointwise, "LARGE", 144)
    written, after = rewritten(convolve_mlps, before)
    assert written == 1
    assert (counts(after)["Conv"], counts(after)["MatMul"], counts(after)["Transpose"]) == (2, 0, 3)
    assert is_left_alone(convolve_last_layers, before)


def test_an_mlp_is_written_once(monkeypatch):
    monkeypatch.setattr(onnx_pointwise, "LARGE", 144)
    assert rewritten(convolve_mlps, graph_of(block, SPEC, **parts()))[0] == 1
