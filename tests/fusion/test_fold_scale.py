from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from deploykit.fusion.fold_scale import fold_scale
from tests.fusion.graphs import (
    Calls,
    calls,
    check_with_dynamic_batch,
    few,
    is_left_alone,
    rewrites,
    targets,
    traced,
    vector,
)

AFFINE = {
    "factor": lambda x, value: x * value,
    "factor first": lambda x, value: value * x,
    "divisor": lambda x, value: x / value,
    "shift": lambda x, value: x + value,
    "shift first": lambda x, value: torch.add(value, x, alpha=3),
    "scaled shift": lambda x, value: torch.add(x, value, alpha=0.5),
    "negative shift": lambda x, value: x - value,
    "turned": lambda x, value: value - x,
}
LAYERS = {
    "conv2d": lambda groups, bias: nn.Conv2d(4, 8, 3, padding=1, groups=groups, bias=bias, dilation=2),
    "same": lambda groups, bias: nn.Conv2d(4, 8, 3, padding="same", groups=groups, bias=bias),
    "transposed": lambda groups, bias: nn.ConvTranspose2d(4, 8, 2, stride=2, groups=groups, bias=bias),
    "linear": lambda groups, bias: nn.Linear(12, 8, bias=bias),
}


def alone(values: torch.Tensor, *, zeros: bool) -> nn.Parameter:
    return nn.Parameter(values.detach().clamp(min=0.3) * (0.0 if zeros else 1.0), requires_grad=False)


@few
@given(
    layer=st.sampled_from(sorted(LAYERS)),
    affine=st.sampled_from(sorted(AFFINE)),
    groups=st.sampled_from([1, 2, 4]),
    bias=st.booleans(),
    whole=st.booleans(),
    zeros=st.booleans(),
    seed=st.integers(0, 99),
)
def test_what_follows_a_layer_goes_into_it(*, layer, affine, groups, bias, whole, zeros, seed):
    assume(not zeros or affine != "divisor")
    shape = () if whole else (8,) if layer == "linear" else (8, 1, 1)
    value = alone(vector(*shape, seed=seed), zeros=zeros)
    graph = traced(
        Calls(
            lambda m, x: AFFINE[affine](m.layer(x), m.value) + 1e-3 * x.mean(),
            layer=LAYERS[layer](groups, bias),
            value=value,
        )
    )
    assert rewrites(graph, fold_scale, seed) == 1
    assert calls(graph, "mul", "div", "sub") == 1, "the factor of the mean"
    assert calls(graph, "add") == 1


@few
@given(
    linear=st.booleans(),
    affine=st.sampled_from(sorted(AFFINE)),
    groups=st.sampled_from([1, 2, 4]),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_what_precedes_unpadded_layers_goes_into_all_of_them(*, linear, affine, groups, bias, seed):
    def both(m, x):
        scaled = AFFINE[affine](x.relu(), m.value)
        return m.first(scaled), m.second(scaled)

    if linear:
        first, second, shape = nn.Linear(12, 8, bias=bias), nn.Linear(12, 3), (12,)
    else:
        first, second, shape = nn.Conv2d(4, 8, 3, stride=2, groups=groups, bias=bias), nn.Conv2d(4, 2, 1), (1, 4, 1, 1)
    value = alone(vector(*shape, seed=seed), zeros=False)
    graph = traced(Calls(both, first=first, second=second, value=value))
    assert rewrites(graph, fold_scale, seed) == 1
    assert set(targets(graph)) == {"aten.relu.default", "aten.linear.default" if linear else "aten.conv2d.default"}


def test_layer_scale_behind_a_permutation_goes_into_the_linear_before_it():
    def block(m, x):
        return x + m.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) * m.gamma

    graph = traced(Calls(block, linear=nn.Linear(4, 4), gamma=vector(4, 1, 1)))
    assert rewrites(graph, fold_scale) == 1
    assert calls(graph, "mul") == 0


def test_a_factor_alone_goes_into_a_padded_convolution():
    module = Calls(lambda m, x: m.conv(x.relu() * m.value), conv=nn.Conv2d(4, 4, 3, padding=1), value=vector(4, 1, 1))
    assert rewrites(traced(module), fold_scale) == 1


def test_a_whole_chain_goes_and_the_graph_is_still_traced():
    module = Calls(
        lambda m, x: (m.linear(x) * m.gamma + m.beta) / 2,
        linear=nn.Linear(12, 8),
        gamma=vector(8),
        beta=vector(8, seed=1),
    )
    assert rewrites(traced(module), fold_scale) == 3
    check_with_dynamic_batch(module, fold_scale)


def test_a_shared_weight_and_the_traced_module_keep_their_numbers():
    module = Calls(lambda m, x: m.linear(x) * m.gamma, linear=nn.Linear(12, 8), gamma=vector(8))
    before = module.linear.weight.detach().clone()
    rewrites(traced(module), fold_scale)
    assert torch.equal(module.linear.weight, before)


def near_miss(name: str) -> nn.Module:
    linear, conv = nn.Linear(12, 8), nn.Conv2d(4, 8, 3, padding=1)
    modules = {
        "read elsewhere": Calls(
            lambda m, x: (m.linear(x) * m.value, m.linear_2(x)), linear=linear, linear_2=linear, value=vector(8)
        ),
        "raw output is a level": Calls(lambda m, x: _with_raw(m.linear(x), m.value), linear=linear, value=vector(8)),
        "along two axes": Calls(lambda m, x: m.linear(x) * m.value, linear=linear, value=vector(12, 8)),
        "along the other axis": Calls(lambda m, x: m.conv(x) * m.value, conv=conv, value=vector(12)),
        "widens": Calls(lambda m, x: m.linear(x).mean(-1, keepdim=True) * m.value, linear=linear, value=vector(8)),
        "made of the images": Calls(lambda m, x: m.linear(x) * x.mean(), linear=linear),
        "activation between": Calls(lambda m, x: m.linear(x).relu() * m.value, linear=linear, value=vector(8)),
        "shift before padding": Calls(lambda m, x: m.conv(x.relu() + m.value), conv=conv, value=vector(4, 1, 1)),
        "before a transposed one": Calls(
            lambda m, x: m.conv(x.relu() * m.value), conv=nn.ConvTranspose2d(4, 4, 2), value=vector(4, 1, 1)
        ),
        "one reader is no layer": Calls(
            lambda m, x: _and_itself(x.relu() * m.value, m.linear), linear=linear, value=vector(12)
        ),
        "divides": Calls(lambda m, x: m.value / m.linear(x), linear=linear, value=vector(8)),
    }
    return modules[name]


def _with_raw(raw, value):
    return raw, raw * value


def _and_itself(scaled, layer):
    return layer(scaled), scaled


@pytest.mark.parametrize(
    "name",
    [
        "read elsewhere",
        "raw output is a level",
        "along two axes",
        "along the other axis",
        "widens",
        "made of the images",
        "activation between",
        "shift before padding",
        "before a transposed one",
        "one reader is no layer",
        "divides",
    ],
)
def test_near_misses_are_left_alone(name):
    assert is_left_alone(near_miss(name), fold_scale)


def test_a_product_that_float_cannot_hold_is_left_alone():
    module = Calls(lambda m, x: m.linear(x) * 1e38 * 1e-38, linear=nn.Linear(12, 8))
    with torch.no_grad():
        module.linear.weight.mul_(1e3)
    graph = traced(module)
    fold_scale(graph)
    assert torch.isfinite(graph.state_dict()["linear.weight"]).all()


@pytest.mark.parametrize(
    "function",
    [lambda m, x: m.linear(x) * m.huge, lambda m, x: m.linear(x.relu() * m.huge)],
    ids=["behind", "before"],
)
def test_a_factor_that_overflows_stays(function):
    linear = nn.Linear(12, 8)
    with torch.no_grad():
        linear.weight.fill_(1e5)
    module = Calls(function, linear=linear, huge=torch.tensor(1e38))
    graph = traced(module)
    before = targets(graph)
    assert fold_scale(graph) == 0
    assert targets(graph) == before


def test_a_shift_goes_into_a_convolution_that_says_it_pads_nothing():
    module = Calls(
        lambda m, x: m.conv(x.relu() + m.shift), conv=nn.Conv2d(4, 4, 3, padding="valid"), shift=vector(4, 1, 1)
    )
    assert rewrites(traced(module), fold_scale) == 1
    padded = Calls(module.function, conv=nn.Conv2d(4, 4, 3, padding="same"), shift=vector(4, 1, 1))
    assert is_left_alone(padded, fold_scale)
