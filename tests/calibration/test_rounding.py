from __future__ import annotations

import pytest
import torch

from deploykit.calibration.rounding import clipped_scales, round_to_nearest, round_with_feedback


def layer(groups: int, channels: int, size: int, rows: int = 4096):
    """A weight, its scales that clip nothing, and the moments of inputs that are strongly correlated."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(groups, size, size, generator=generator) / size**0.5
    common = 2 * torch.randn(groups, rows, 1, generator=generator)
    read = torch.randn(groups, rows, size, generator=generator) @ mixing + common
    weight = torch.randn(groups, channels, size, generator=generator)
    return weight, weight.abs().amax(2) / 127, read.transpose(1, 2) @ read / rows


def loss(integers, scales, weight, moments) -> float:
    error = integers * scales.unsqueeze(2) - weight
    return float(((error @ moments) * error).sum())


@pytest.mark.parametrize(("groups", "channels", "size"), [(1, 32, 64), (24, 1, 9), (2, 8, 300)])
def test_feedback_loses_far_less_of_the_output_than_rounding_to_the_nearest(groups, channels, size):
    weight, scales, moments = layer(groups, channels, size)
    nearest = loss(round_to_nearest(weight, scales), scales, weight, moments)
    assert loss(round_with_feedback(weight, scales, moments), scales, weight, moments) < nearest / 2.5


def test_a_small_weight_is_rounded_almost_as_well_as_any_integers_can():
    weight, scales, moments = layer(1, 4, 6)
    found = round_with_feedback(weight, scales, moments)
    offsets = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0])] * 6)
    for channel in range(4):
        tried = round_to_nearest(weight, scales)[0, channel] + offsets
        error = tried * scales[0, channel] - weight[0, channel]
        best = float(((error @ moments[0]) * error).sum(1).min())
        one = found[:, channel : channel + 1]
        assert loss(one, scales[:, channel : channel + 1], weight[:, channel : channel + 1], moments) < 1.6 * best


@pytest.mark.parametrize("top", [63, 127])
def test_integers_stay_within_the_bits(top):
    weight, scales, moments = layer(1, 16, 32)
    rounded = round_with_feedback(weight, scales * 127 / top, moments, top)
    assert rounded.abs().max() == top
    assert torch.equal(rounded, rounded.round())


def test_equal_inputs_give_equal_integers():
    weight, scales, moments = layer(2, 8, 40)
    assert torch.equal(round_with_feedback(weight, scales, moments), round_with_feedback(weight, scales, moments))


@pytest.mark.parametrize("moments", ["zeros", "one channel", "few rows"])
def test_inputs_that_say_little_round_to_something_near(moments):
    weight, scales, full = layer(1, 8, 32)
    if moments == "few rows":
        full = layer(1, 8, 32, rows=5)[2]
    elif moments == "one channel":
        full[:, 1:] = full[:, :, 1:] = 0
    else:
        full = torch.zeros_like(full)
    rounded = round_with_feedback(weight, scales, full)
    assert torch.isfinite(rounded).all()
    assert (rounded * scales.unsqueeze(2) - weight).abs().max() < 8 * scales.max()


def test_a_scale_clips_where_one_weight_is_far_above_the_others():
    weight, _, moments = layer(1, 8, 64)
    weight[:, 0, 0] = 2 * weight[:, 0].abs().max()
    moments[:, 0] = moments[:, :, 0] = 0
    moments[:, 0, 0] = 1e-6
    scales = weight.abs().amax(2) / 127
    clipped = clipped_scales(weight, scales, moments)
    assert clipped[0, 0] < 0.6 * scales[0, 0]
    before, after = (loss(round_to_nearest(weight, s), s, weight, moments) for s in (scales, clipped))
    assert after < before


def test_a_scale_is_never_made_larger():
    weight, scales, moments = layer(3, 8, 20)
    assert (clipped_scales(weight, scales, moments) <= scales).all()
