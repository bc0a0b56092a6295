from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from deploykit.calibration.channel_groups import channel_groups
from deploykit.calibration.equalization import scale_group
from deploykit.fusion.program import export_program
from deploykit.spec import InputSpec


def groups_of(forward, **layers):
    """The groups of a network, by how many writers, readers and outputs each has."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            for name, layer in layers.items():
                self.add_module(name, layer)

        def forward(self, images):
            return (forward(self, images),)

    program = export_program(Network().eval().requires_grad_(False), InputSpec(height=16, width=16))
    found = channel_groups(program.module())
    return [(len(group.writers), len(group.readers), len(group.outputs)) for group in found]


def conv(source=8, target=8, **options):
    return nn.Conv2d(source, target, 3, padding=1, **options)


def test_a_convolution_scales_with_the_one_behind_its_relu_and_pool():
    assert groups_of(lambda m, x: m.b(F.max_pool2d(m.a(x).relu(), 2)), a=conv(3), b=conv()) == [(1, 1, 0)]


@pytest.mark.parametrize("clip", [F.relu6, lambda x: x.clamp(0, 6), lambda x: x.clamp(min=0)], ids=["6", "0-6", "0"])
def test_a_clip_of_the_first_convolution_stays_in_its_group(clip):
    assert groups_of(lambda m, x: m.b(clip(m.a(x))), a=conv(3), b=conv()) == [(1, 1, 0)]


def test_a_clip_behind_any_other_layer_blocks_the_group():
    assert groups_of(lambda m, x: m.c(F.relu6(m.b(m.a(x)))), a=conv(3), b=conv(), c=conv()) == [(1, 1, 0)]


def test_a_residual_stream_is_one_group_and_a_level_on_it_an_output():
    def forward(m, x):
        stream = m.a(x)
        return stream + m.c(m.b(stream).relu())

    assert groups_of(forward, a=conv(3), b=conv(), c=conv()) == [(2, 1, 1), (1, 1, 0)]


def test_a_depthwise_convolution_reads_one_group_and_writes_another():
    layers = {"a": conv(3), "b": conv(groups=8), "c": conv()}
    assert groups_of(lambda m, x: m.c(m.b(m.a(x)).relu()), **layers) == [(1, 1, 0), (1, 1, 0)]


def test_an_unscaled_gate_leaves_the_map_in_its_group():
    def forward(m, x):
        maps = m.a(x).relu()
        return m.b(maps * m.gate(maps.mean((2, 3), keepdim=True)).sigmoid())

    assert groups_of(forward, a=conv(3), gate=nn.Conv2d(8, 8, 1), b=conv()) == [(1, 2, 0)]


def test_a_norm_scales_with_the_linears_that_read_its_tokens_in_any_order():
    def forward(m, x):
        tokens = m.norm(m.patches(x).flatten(2).transpose(1, 2))
        windows = tokens.reshape(-1, 2, 2, 2, 2, 8).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, 8)
        return m.a(torch.roll(windows, 1, 1)) + m.b(windows)

    layers = {"patches": nn.Conv2d(3, 8, 4, 4), "norm": nn.LayerNorm(8), "a": nn.Linear(8, 8), "b": nn.Linear(8, 8)}
    assert groups_of(forward, **layers) == [(1, 2, 0)]


def test_layers_that_share_a_weight_scale_together():
    def forward(m, x):
        return m.b(m.a(x[:, :3]).relu()) + m.b(m.c(x[:, :3]).relu())

    assert groups_of(forward, a=conv(3), c=conv(3), b=conv()) == [(2, 2, 0)]


@pytest.mark.parametrize(
    "between",
    [F.gelu, F.hardswish, F.hardtanh, lambda x: x.softmax(1), lambda x: x + 1, lambda x: x * x, lambda x: x.flip(1)],
    ids=["gelu", "hard-swish", "hardtanh", "softmax", "shift", "square", "flip"],
)
def test_what_does_not_commute_with_a_factor_blocks_the_group(between):
    assert groups_of(lambda m, x: m.b(between(m.a(x))), a=conv(3), b=conv()) == []


def test_a_grouped_convolution_reads_a_group():
    assert groups_of(lambda m, x: m.b(m.a(x).relu()), a=conv(3), b=conv(groups=2)) == [(1, 1, 0)]


def test_a_mean_over_channels_blocks_the_group():
    assert groups_of(lambda m, x: m.b(m.a(x)) + m.a(x).mean(1, keepdim=True), a=conv(3), b=conv()) == []


def test_a_sum_with_a_map_of_no_group_blocks_it():
    assert groups_of(lambda m, x: m.b(m.a(x) + m.c(x).sigmoid()), a=conv(3), c=conv(3), b=conv()) == []


def test_constants_that_are_added_are_scaled_with_their_group():
    """As a shift of each channel, of the map or of the tokens."""
    torch.manual_seed(0)

    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.shift = conv(3), conv(), nn.Parameter(torch.randn(8, 1, 1))

        def forward(self, images):
            return (self.b((self.a(images) + self.shift).relu()),)

    module = export_program(Shifted().eval().requires_grad_(False), InputSpec(height=16, width=16)).module()
    images = torch.randn(1, 3, 16, 16)
    (expected,) = module(images)
    shift = module.get_parameter("shift").clone()
    (group,) = channel_groups(module)
    assert (len(group.writers), len(group.shifts), len(group.readers)) == (1, 1, 1)
    scale_group(module, group, torch.linspace(0.5, 4, 8, dtype=torch.double))
    torch.testing.assert_close(module(images)[0], expected, rtol=1e-4, atol=1e-5)
    assert not torch.equal(module.get_parameter("shift"), shift)


def test_maps_that_are_joined_side_by_side_are_one_group_and_channel_by_channel_none():
    layers = {"a": conv(3), "c": conv(3), "b": conv(), "wide": conv(16)}
    assert groups_of(lambda m, x: m.b(torch.cat((m.a(x), m.c(x)), 2)), **layers) == [(2, 1, 0)]
    assert groups_of(lambda m, x: m.wide(torch.cat((m.a(x), m.c(x)), 1)), **layers) == []


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.columns(m.a(x)),
        lambda m, x: m.b(m.a(x) + m.one(x)),
        lambda m, x: m.linear(m.a(x).flatten(2).transpose(1, 2) + m.a(x).mean((2, 3))),
        lambda m, x: m.b(m.planes(m.c(x))),
    ],
    ids=["read along another axis", "one channel for all", "a vector for all tokens", "a norm of whole maps"],
)
def test_what_goes_across_channels_blocks_the_group(forward):
    layers = {"a": conv(3), "b": conv(), "c": conv(3), "one": conv(3, 1), "linear": nn.Linear(8, 4)}
    layers |= {"columns": nn.Linear(16, 4), "planes": nn.LayerNorm([8, 16, 16])}
    assert groups_of(forward, **layers) == []
