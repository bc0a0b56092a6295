from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from deploykit.fusion.plain_divisor import plain_divisor
from tests.fusion.graphs import Calls, check_with_dynamic_batch, few, is_left_alone, rewrites, traced


@few
@given(
    kernel=st.sampled_from([2, 3, (2, 3), (5, 1)]),
    stride=st.sampled_from([None, 1, 2, (3, 2)]),
    padded=st.booleans(),
    ceil_mode=st.booleans(),
    divisor=st.integers(1, 9),
)
def test_a_pooling_with_a_divisor_is_one_over_whole_windows(*, kernel, stride, padded, ceil_mode, divisor):
    padding = (1 if isinstance(kernel, int) else tuple(size // 2 for size in kernel)) if padded else 0
    pool = nn.AvgPool2d(kernel, stride, padding, ceil_mode=ceil_mode, divisor_override=divisor)
    assert rewrites(traced(Calls(lambda m, x: pool(m.conv(x)), conv=nn.Conv2d(4, 3, 1))), plain_divisor) == 1


def test_a_graph_of_any_batch_is_still_traced():
    check_with_dynamic_batch(Calls(lambda m, x: nn.AvgPool2d(3, 2, 1, divisor_override=4)(x)), plain_divisor)


def test_a_pooling_without_a_divisor_is_left_alone():
    assert is_left_alone(Calls(lambda m, x: nn.AvgPool2d(3, 2, 1)(x)), plain_divisor)
