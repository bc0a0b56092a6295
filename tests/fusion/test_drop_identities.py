from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from deploykit.fusion.drop_identities import drop_identities
from tests.fusion.graphs import (
    DYNAMIC,
    Calls,
    Tuple,
    calls,
    check_with_dynamic_batch,
    few,
    images,
    is_left_alone,
    rewrites,
    targets,
    traced,
)

NOTHING = {
    "dropout": lambda x: nn.functional.dropout(x, 0.5, training=False),
    "dropout of nothing": lambda x: nn.functional.dropout(x, 0.0, training=True),
    "feature dropout": lambda x: nn.functional.dropout2d(x, 0.5, training=False),
    "alpha dropout": lambda x: nn.functional.alpha_dropout(x, 0.5, training=False),
    "clone": lambda x: x.clone(),
    "contiguous": lambda x: x.contiguous(),
    "same view": lambda x: x.view(x.shape),
    "same reshape": lambda x: x.reshape(x.shape[0], 4, -1, 12),
    "same expand": lambda x: x.expand(-1, 4, 12, 12),
    "same permute": lambda x: x.permute(0, 1, 2, 3),
    "whole slice": lambda x: x[:, :],
    "no padding": lambda x: nn.functional.pad(x, (0, 0, 0, 0)),
    "times one": lambda x: x * 1.0,
    "times ones": lambda x: x * torch.ones(4, 1, 1),
    "over one": lambda x: x / 1,
    "plus zero": lambda x: x + 0.0,
    "minus zero": lambda x: x - 0.0,
    "there and back": lambda x: x.permute(0, 2, 3, 1).permute(0, 3, 1, 2),
    "turned twice": lambda x: x.mT.swapaxes(2, 3),
    "moved": lambda x: x.movedim(1, 3).movedim(-1, 1),
    "transposed twice": lambda x: x.transpose(1, 3).transpose(3, 1),
    "cast to its type": lambda x: x.to(torch.float32),
}


@few
@given(names=st.lists(st.sampled_from([name for name in NOTHING if name != "times ones"]), min_size=1, max_size=5))
def test_any_chain_of_them_goes_and_no_bit_changes(names):
    def chain(_, inputs):
        x = inputs.exp()
        for name in names:
            x = NOTHING[name](x)
        return x.sin()

    graph = traced(Calls(chain))
    (expected,) = graph(images())
    drop_identities(graph)
    assert targets(graph) == ["aten.exp.default", "aten.sin.default"]
    assert torch.equal(graph(images())[0], expected)


@pytest.mark.parametrize(
    "function",
    [
        lambda _, x: x.exp() * 1.5,
        lambda _, x: x.exp() + 1e-3,
        lambda _, x: x.exp()[:, :, ::2],
        lambda _, x: x.exp().permute(0, 1, 3, 2),
        lambda _, x: x.exp()[:, :1].expand(-1, 4, -1, -1),
        lambda _, x: nn.functional.pad(x.exp(), (1, -1)),
        lambda _, x: nn.functional.pad(x.exp(), (1, 0)),
        lambda _, x: x.exp()[:, :1] + x.new_zeros(4, 1, 1),
    ],
    ids=["factor", "small shift", "step", "permute", "expand", "shifted", "padded", "zero that widens"],
)
def test_near_misses_are_left_alone(function):
    assert is_left_alone(Calls(function), drop_identities)


def test_a_cast_to_another_type_is_left_alone():
    graph = traced(Calls(lambda _, x: x.exp().to(torch.float64)))
    drop_identities(graph)
    assert calls(graph, "to") == 1


def test_dropout_of_training_is_left_alone():
    graph = traced(Calls(lambda m, x: m.drop(x.exp()), drop=nn.Dropout(0.5)), training=True)
    drop_identities(graph)
    assert calls(graph, "dropout") == 1


def test_operators_that_work_in_place_become_plain_ones():
    module = Tuple(nn.Conv2d(4, 4, 3), nn.SiLU(inplace=True), nn.Dropout(0.1, inplace=True), nn.ReLU(inplace=True))
    graph = traced(module.eval())
    assert rewrites(graph, drop_identities) == 4
    assert targets(graph) == ["aten.conv2d.default", "aten.silu.default", "aten.relu.default"]


def test_a_tensor_of_the_forward_is_a_constant_and_keeps_no_copies():
    def normalized(m, x):
        mean = torch.tensor([0.1, 0.2, 0.3, 0.4]).view(1, 4, 1, 1)
        return m.conv(x - mean).clone()

    graph = traced(Calls(normalized, conv=nn.Conv2d(4, 4, 1)))
    rewrites(graph, drop_identities)
    assert targets(graph) == ["aten.reshape.default", "aten.sub.Tensor", "aten.conv2d.default"]


def test_what_is_written_in_place_and_read_elsewhere_keeps_its_copies():
    def shared(_, x):
        first = x.exp()
        copy = first.clone()
        first.mul_(2.0)
        return copy + first

    graph = traced(Calls(shared))
    (expected,) = graph(images())
    drop_identities(graph)
    assert calls(graph, "clone", "mul_") == 2
    assert torch.equal(graph(images())[0], expected)


def test_a_permutation_that_is_read_elsewhere_stays_once():
    def read_twice(_, x):
        last = x.exp().permute(0, 2, 3, 1)
        return last.sin(), last.permute(0, 3, 1, 2).cos()

    graph = traced(Calls(read_twice))
    assert rewrites(graph, drop_identities) == 1
    assert calls(graph, "permute") == 1


def test_unused_branches_go():
    def unused(_, x):
        x.sin().cos()
        return x.exp()

    graph = traced(Calls(unused))
    rewrites(graph, drop_identities)
    assert targets(graph) == ["aten.exp.default"]


def test_a_reshape_that_spells_out_the_batch_infers_it():
    module = Calls(lambda _, x: x.exp().view(x.shape[0] * 4, 12, 12).reshape(x.shape[0], 4, 144).sin())
    graph = traced(module, DYNAMIC)
    drop_identities(graph)
    assert calls(graph, "sym_size") == 0
    check_with_dynamic_batch(module, drop_identities)


@pytest.mark.parametrize(
    "function",
    [
        lambda _, x: x.exp().chunk(2, 1)[0].mul_(2.0),
        lambda _, x: x.exp().view(-1).mul_(2.0),
        lambda _, x: x.mul_(2.0),
    ],
    ids=["a part of another", "a view", "the images"],
)
def test_what_may_be_seen_under_another_name_is_still_written_in_place(function):
    graph = traced(Calls(function))
    drop_identities(graph)
    assert calls(graph, "mul_") == 1


def test_two_permutations_of_which_the_first_is_read_elsewhere_stay_two():
    def read_twice(_, x):
        last = x.exp().permute(0, 2, 3, 1)
        return last.sin(), last.permute(0, 2, 1, 3).cos()

    assert is_left_alone(Calls(read_twice), drop_identities)
