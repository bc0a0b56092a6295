from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
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


@pytest.mark.parametrize(
    "change",
    [
        lambda pad: pad.inputs[0].__setattr__("shape", None),
        lambda pad: _amounts(pad, [1, 0, 0, 0, 0, 0, 0, 0]),
        lambda pad: _amounts(pad, [0, 0, 0, 0, 0, 0, 0, 0]),
        lambda pad: _amounts(pad, [0, 0, 13, 0, 0, 0, 0, 0]),
        lambda pad: _amounts(pad, [0, 0, -1, 0, 0, 0, 0, 0]),
    ],
    ids=["unknown size", "of the batch", "of nothing", "more than once around", "a cut"],
)
def test_paddings_that_are_no_copy_of_one_side_are_left_alone(change):
    model = ir.from_proto(
        onnx.parser.parse_model(
            """<ir_version: 9, opset_import: ["" : 19]> g (float[1, 4, 12, 12] x) => (float[1, 4, 12, 13] y)
            <int64[8] amounts = {0, 0, 0, 1, 0, 0, 0, 0}> { a = Relu (x)  y = Pad <mode = "wrap"> (a, amounts) }"""
        )
    )
    relu, wrap = model.graph
    relu.outputs[0].shape = ir.Shape([1, 4, 12, 12])
    assert concatenate_wraps(model.clone()) == 1
    change(wrap)
    assert is_left_alone(concatenate_wraps, model)


def _amounts(pad, amounts):
    pad.inputs[1].const_value = ir.tensor(np.array(amounts, np.int64), name="amounts")
