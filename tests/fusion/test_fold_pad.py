from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from deploykit.fusion.fold_pad import fold_pad
from tests.fusion.graphs import Calls, calls, check_with_dynamic_batch, few, is_left_alone, rewrites, traced

pad = nn.functional.pad


@few
@given(
    rows=st.integers(0, 3),
    columns=st.integers(1, 3),
    padding=st.sampled_from([0, 1, (2, 0), "valid"]),
    kernel=st.sampled_from([1, 2, (3, 1)]),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 2, 4]),
    bias=st.booleans(),
)
def test_zeros_around_a_map_become_the_convolutions_own(
    *, rows, columns, padding, kernel, stride, dilation, groups, bias
):
    conv = nn.Conv2d(4, 8, kernel, stride, padding, dilation, groups, bias=bias)
    graph = traced(Calls(lambda m, x: m.conv(pad(x, (columns, columns, rows, rows))), conv=conv))
    assert rewrites(graph, fold_pad) == 1
    assert calls(graph, "pad", "conv2d") == 1


def test_the_last_axis_alone_one_dimension_and_two_readers():
    def network(m, x):
        padded = pad(x, (2, 2))
        return m.first(padded), m.second(padded), m.line(pad(x.flatten(2), (1, 1)))

    graph = traced(
        Calls(
            network, first=nn.Conv2d(4, 8, 3), second=nn.Conv2d(4, 8, 1, padding=1), line=nn.Conv1d(4, 2, 3, padding=1)
        )
    )
    assert rewrites(graph, fold_pad) == 2
    assert calls(graph, "pad") == 0


def test_a_graph_of_any_batch_is_still_traced():
    check_with_dynamic_batch(Calls(lambda m, x: m.conv(nn.ZeroPad2d(1)(x)), conv=nn.Conv2d(4, 8, 3)), fold_pad)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.conv(pad(x, (0, 1, 0, 1))),
        lambda m, x: m.conv(pad(x, (1, 1, 1, 1), value=1.0)),
        lambda m, x: m.conv(pad(x, (1, 1, 1, 1), mode="reflect")),
        lambda m, x: m.conv(pad(x, (-1, -1, -1, -1))),
        lambda m, x: m.conv(pad(x, (0, 0, 0, 0, 0, 0, 1, 1))),
        lambda m, x: m.conv(pad(x, (1, 1, 1, 1)).relu()),
        lambda m, x: m.same(pad(x, (1, 1, 1, 1))),
        lambda m, x: _and_itself(m, pad(x, (1, 1, 1, 1))),
    ],
    ids=["one side", "ones", "reflected", "cropped", "batch", "relu between", "'same'", "read elsewhere"],
)
def test_near_misses_are_left_alone(function):
    module = Calls(function, conv=nn.Conv2d(4, 8, 3), same=nn.Conv2d(4, 8, 3, padding="same"))
    assert is_left_alone(module, fold_pad)


def _and_itself(m, padded):
    return padded, m.conv(padded)
