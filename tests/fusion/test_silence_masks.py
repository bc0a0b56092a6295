from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from deploykit.fusion.silence_masks import SILENT, SUBNORMAL, silence_masks
from tests.fusion.graphs import Calls, check_with_dynamic_batch, few, is_left_alone, rewrites, traced

attend = nn.functional.scaled_dot_product_attention


def heads(x):
    return x.flatten(2)[:, :, None, :8].transpose(1, 2)  # (N, 1, 4, 8)


def attention(bias, **settings):
    return Calls(lambda m, x: attend(heads(x), heads(x), heads(x), m.bias, **settings), bias=bias).eval()


def mask(value: float, seed: int = 0, shape=(1, 4, 4)) -> torch.Tensor:
    """A bias of which about a third is ``value`` lower; each query keeps one key."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.rand(shape, generator=generator) < 0.3
    hidden[..., 0] = False
    return torch.randn(shape, generator=generator) + value * hidden


def biases(graph):
    return [parameter for name, parameter in graph.named_parameters() if "bias" in name]


@few
@given(
    value=st.sampled_from([-100.0, -150.0, -500.0]),
    shape=st.sampled_from([(4, 4), (1, 4, 4), (1, 1, 4, 4)]),
    offset=st.sampled_from([0.0, 30.0]),
    seed=st.integers(0, 9),
)
def test_masks_underflow(value, shape, offset, seed):
    hidden = mask(value, seed, shape)
    graph = traced(attention(hidden + offset))
    assert rewrites(graph, silence_masks) == int(hidden.min() < -90)
    (bias,) = biases(graph)
    assert torch.equal(bias, torch.where(hidden < -90, -1000.0, hidden + offset))


def test_the_limits_are_those_of_single_precision():
    smallest_normal, smallest = math.log(2.0**-126), math.log(2.0**-149)
    assert SILENT < smallest < -100 < smallest_normal < SUBNORMAL


@pytest.mark.parametrize(
    "bias",
    [mask(-20.0), mask(-86.0) * 0.9, mask(-1000.0) - 10, mask(float("-inf")).nan_to_num(0.0, neginf=float("-inf"))],
    ids=["weak", "nearly", "silent already", "minus infinity"],
)
def test_other_biases_are_left_alone(bias):
    assert is_left_alone(attention(bias), silence_masks)


def test_boolean_and_computed_masks_are_left_alone():
    boolean = Calls(
        lambda m, x: attend(heads(x), heads(x), heads(x), m.mask), mask=torch.tensor([[True, False, True, True]])
    )
    computed = Calls(lambda m, x: attend(heads(x), heads(x), heads(x), heads(x)[..., :4] - 100.0))
    assert is_left_alone(boolean.eval(), silence_masks)
    assert is_left_alone(computed.eval(), silence_masks)


def test_a_bias_that_two_attentions_share_is_silenced_for_both():
    module = Calls(
        lambda m, x: attend(attend(heads(x), heads(x), heads(x), m.bias), heads(x), heads(x), m.bias), bias=mask(-100.0)
    )
    graph = traced(module.eval())
    assert rewrites(graph, silence_masks) == 2
    assert silence_masks(graph) == 0


def test_a_dynamic_batch_stays():
    check_with_dynamic_batch(attention(mask(-100.0)), silence_masks)
