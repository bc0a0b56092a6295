from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from deploykit.fusion.onnx_wrap_pad import concatenate_wraps
from tests.fusion.graphs import DYNAMIC, SPEC
from tests.fusion.onnx_graphs import counts, fewer, graph_of, is_left_alone, rewritten

pad = nn.functional.pad


@fewer
@given(
    spec=st.sampled_from([SPEC, DYNAMIC]),
    amounts=st.tuples(*[st.integers(0, 3)] * 4).filter(any),
    inside=st.booleans(),
)
def test_circular_padding_is_what_it_copies(spec, amounts, inside):
    def network(m, x):
        wrapped = pad(x, amounts, mode="circular")
        return m.conv(wrapped) if inside else wrapped

    written, after = rewritten(concatenate_wraps, graph_of(network, spec, conv=nn.Conv2d(4, 2, 3)))
    assert written == 1
    assert "Pad" not in counts(after)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "constant"])
def test_other_paddings_are_left_alone(mode):
    assert is_left_alone(concatenate_wraps, graph_of(lambda m, x: pad(x, (1, 2, 0, 1), mode=mode).relu()))
