from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from deploykit.fusion.onnx_groupnorm import convolve_groupnorm, spell_out_groupnorm
from tests.fusion.graphs import DYNAMIC, SPEC, vector
from tests.fusion.onnx_graphs import counts, fewer, graph_of, is_left_alone, rewritten


def group_norm(groups: int, seed: int = 0, **settings) -> nn.GroupNorm:
    norm = nn.GroupNorm(groups, 4, **settings)
    norm.weight, norm.bias = vector(4, seed=seed), vector(4, seed=seed + 1)
    return norm


@fewer
@given(
    spec=st.sampled_from([SPEC, DYNAMIC]),
    groups=st.sampled_from([2, 4]),
    shift=st.sampled_from([0.0, 5.0]),
    seed=st.integers(0, 9),
)
def test_group_norm_is_spelled_out_by_means(spec, groups, shift, seed):
    before = graph_of(lambda m, x: m.norm(x + shift).relu(), spec, norm=group_norm(groups, seed))
    written, after = rewritten(spell_out_groupnorm, before)
    assert written == 1
    assert not {"InstanceNormalization", "BatchNormalization"} & set(counts(after))


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: nn.functional.group_norm(x, 1, m.norm.weight, m.norm.bias).relu(),
        lambda m, x: m.norm(x.flatten(2)).relu(),
        lambda m, x: m.norm(x),
    ],
    ids=["one group", "three axes", "is the output"],
)
def test_other_norms_are_not_spelled_out(function):
    assert is_left_alone(spell_out_groupnorm, graph_of(function, norm=group_norm(2)))


@pytest.mark.parametrize("spec", [SPEC, DYNAMIC])
def test_the_affine_part_of_a_group_norm_becomes_a_depthwise_convolution(spec):
    norm = nn.GroupNorm(8, 32)
    norm.weight, norm.bias = vector(32), vector(32, seed=1)
    before = graph_of(lambda m, x: m.norm(m.conv(x)).relu(), spec, conv=nn.Conv2d(4, 32, 1), norm=norm)
    written, after = rewritten(convolve_groupnorm, before)
    assert written == 1
    assert (counts(after)["Conv"], counts(after)["BatchNormalization"]) == (2, 0)


def test_channels_that_are_no_whole_blocks_and_batch_norms_stay():
    few_channels = graph_of(lambda m, x: m.norm(x).relu(), norm=group_norm(2))
    batch = graph_of(lambda m, x: m.norm(x.relu()).relu(), norm=nn.BatchNorm2d(4))
    assert is_left_alone(convolve_groupnorm, few_channels)
    for rewrite in (convolve_groupnorm, spell_out_groupnorm):
        assert is_left_alone(rewrite, batch)


@pytest.mark.parametrize(
    ("kind", "place", "number"),
    [("BatchNormalization", 3, 0.5), ("BatchNormalization", 4, 2.0), ("InstanceNormalization", 1, 2.0)],
    ids=["a mean", "a variance", "a gain of each group"],
)
def test_a_norm_that_does_more_than_its_groups_is_none(kind, place, number):
    before = graph_of(lambda m, x: m.norm(x).relu(), SPEC, norm=group_norm(2))
    assert spell_out_groupnorm(before.clone()) == 1
    node = next(node for node in before.graph if node.op_type == kind)
    old = node.inputs[place]
    changed = ir.Value(name="changed", const_value=ir.tensor(np.full_like(old.const_value.numpy(), number)))
    changed.shape, changed.type = old.shape, old.type
    before.graph.register_initializer(changed)
    node.replace_input_with(place, changed)
    assert is_left_alone(spell_out_groupnorm, before)


def test_a_map_of_unknown_sides_keeps_its_norm():
    before = graph_of(lambda m, x: m.norm(x).relu(), SPEC, norm=group_norm(2))
    for node in before.graph:
        for value in (*node.inputs, *node.outputs):
            if value is not None and value.shape is not None and len(value.shape) == 4:
                value.shape = ir.Shape([*value.shape[:2], "height", "width"])
    assert is_left_alone(spell_out_groupnorm, before)
