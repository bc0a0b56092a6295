from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from deploykit.backends.onnxruntime import fuse_gates as module
from deploykit.backends.onnxruntime.fuse_gates import fuse_gates
from tests.fusion.graphs import DYNAMIC, SPEC
from tests.fusion.onnx_graphs import counts, fewer, graph_of, is_left_alone, rewritten


def parts(
    after: nn.Module | None = None,
    squash: type[nn.Module] = nn.Sigmoid,
    act: type[nn.Module] = nn.SiLU,
    hidden: int = 4,
) -> dict:
    return {
        "conv": nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), act()),
        "gate": nn.Sequential(nn.Conv2d(8, hidden, 1), act(), nn.Conv2d(hidden, 8, 1), squash()),
        "after": after or nn.Conv2d(8, 4, 1),
    }


def excite(m, x):
    features = m.conv(x)
    return m.after(features * m.gate(features.mean((2, 3), keepdim=True)))


def run(function, spec=SPEC, **modules):
    before = graph_of(function, spec, **modules)
    written, after = rewritten(fuse_gates, before)
    return written, before, after


@fewer
@given(
    squash=st.sampled_from([nn.Sigmoid, nn.Hardsigmoid]),
    act=st.sampled_from([nn.SiLU, nn.ReLU, nn.Hardswish]),
    spec=st.sampled_from([SPEC, DYNAMIC]),
    flipped=st.booleans(),
)
def test_a_gate_of_a_small_map_is_spread_over_it(squash, act, spec, flipped):
    def other(m, x):
        features = m.conv(x)
        return m.after(m.gate(features.mean((2, 3), keepdim=True)) * features)

    written, _, after = run(other if flipped else excite, spec, **parts(None, squash, act))
    assert written == 1
    assert (counts(after)["Resize"], counts(after)["GlobalAveragePool"], counts(after)["ReduceMean"]) == (1, 1, 0)


def test_a_gate_of_a_large_map_goes_to_the_weights_where_there_is_one_image(monkeypatch):
    monkeypatch.setattr(module, "LARGE", 144)
    written, before, after = run(excite, **parts())
    assert written == 1
    assert counts(after)["Resize"] == 0
    (gated,) = (node for node in after.graph if node.op_type == "Conv" and node.inputs[1].name.endswith("_weights"))
    assert gated.inputs[0].name == before.graph[-2].inputs[0].name
    written, _, after = run(excite, DYNAMIC, **parts())
    assert (written, counts(after)["Resize"]) == (1, 1), "each image has weights of its own"


@pytest.mark.parametrize(
    "after",
    [
        nn.Conv2d(8, 4, 3, padding=1),
        nn.Conv2d(8, 4, 1, groups=2),
        nn.Conv2d(8, 4, 1, stride=2),
        nn.Conv2d(8, 4, 1, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 5, 1),
    ],
    ids=["3x3", "groups", "strided", "padded", "no convolution", "wide"],
)
def test_only_a_plain_pointwise_layer_takes_the_gate(monkeypatch, after):
    monkeypatch.setattr(module, "LARGE", 144)
    written, _, model = run(excite, **parts(after))
    assert (written, counts(model)["Resize"]) == (1, 1)


def test_a_gated_map_that_something_else_reads_keeps_its_product(monkeypatch):
    monkeypatch.setattr(module, "LARGE", 144)

    def twice(m, x):
        features = m.conv(x)
        gated = features * m.gate(features.mean((2, 3), keepdim=True))
        return m.after(gated), gated

    written, after = rewritten(fuse_gates, graph_of(twice, SPEC, ("logits", "stage1"), **parts()))
    assert written == 1
    assert counts(after)["Resize"] == 1
    assert [value.name for value in after.graph.outputs] == ["logits", "stage1"]


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.after((f := m.conv(x)) * m.gate(f.relu().mean((2, 3), keepdim=True))),
        lambda m, x: m.after((f := m.conv(x)) * m.gate(f.mean((2,), keepdim=True))),
        lambda m, x: m.after((f := m.conv(x)) * m.gate(f.amax((2, 3), keepdim=True))),
        lambda m, x: m.after((f := m.conv(x)) * m.gate(f)),
        lambda m, x: m.after((f := m.conv(x)) + m.gate(f.mean((2, 3), keepdim=True))),
        lambda m, x: m.after((f := m.conv(x).mean((2, 3), keepdim=True)) * m.gate(f)),
    ],
    ids=["mean of something else", "one axis", "maximum", "no mean", "sum", "one position"],
)
def test_near_misses_are_left_alone(function):
    assert is_left_alone(fuse_gates, graph_of(function, SPEC, **parts()))


def test_a_gate_without_blocks_stays():
    assert is_left_alone(fuse_gates, graph_of(excite, SPEC, **parts(hidden=6)))
