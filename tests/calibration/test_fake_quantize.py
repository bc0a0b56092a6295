import numpy as np
import pytest
import torch

from deploykit.calibration.fake_quantize import (
    FakeQuantize,
    FakeQuantizeBias,
    FakeQuantizedWeight,
)
from deploykit.calibration.quantize_activations import INT8, UINT8
from deploykit.calibration.ranges import ActivationRange, TensorStatistics, quantize_weight

RANGE = ActivationRange(low=-1.0, high=3.0, amax=3.0)


def seen(high: float) -> TensorStatistics:
    return TensorStatistics(low=0.0, high=high, mean=0.0, deviation=1.0, sqnr_db=30.0)


@pytest.mark.parametrize("kind", [UINT8, INT8])
def test_it_rounds_as_the_integers_of_the_range_do(kind):
    values = torch.linspace(-4, 6, 1001)
    scale, zero = (float(part) for part in kind.parameters(RANGE))
    bounds = np.iinfo(kind.dtype)
    expected = (np.clip(np.round(values.numpy() / scale) + zero, bounds.min, bounds.max) - zero) * scale
    found = FakeQuantize(RANGE, kind)(values).detach().numpy()
    differing = np.abs(found - expected) > 1e-5  # a tie may go either way
    assert differing.mean() < 0.01
    assert np.abs(found - expected).max() <= scale * 1.001


def test_the_range_comes_back_as_it_was():
    quantizer = FakeQuantize(RANGE, UINT8)
    scale, zero = UINT8.parameters(RANGE)
    found_scale, found_zero = UINT8.parameters(quantizer.range())
    assert found_zero == zero
    assert found_scale == pytest.approx(scale, rel=1e-5)
    assert quantizer.range().amax == pytest.approx(3.0, rel=1e-5)
    assert FakeQuantize(RANGE, INT8).range().amax == pytest.approx(3.0, rel=1e-5)


def test_gradients_are_those_of_learned_steps():
    quantizer = FakeQuantize(RANGE, UINT8)
    values = torch.tensor([-5.0, 0.1003, 5.0], requires_grad=True)
    quantizer(values).sum().backward()
    scale, zero = (float(part) for part in UINT8.parameters(RANGE))
    assert values.grad.tolist() == [0.0, 1.0, 0.0]
    inside = round(0.1003 / scale) * scale - 0.1003
    assert quantizer.log_scale.grad.item() == pytest.approx(
        scale * (0 - zero) + inside + scale * (255 - zero), rel=1e-4
    )
    assert quantizer.zero_point.grad.item() == pytest.approx(-2 * scale, rel=1e-5)


def test_a_range_without_negative_numbers_keeps_its_zero_point_and_does_not_pass_what_was_seen():
    quantizer = FakeQuantize(ActivationRange(low=0.0, high=5.0, amax=5.0), UINT8, seen(6.0))
    assert [name for name, _ in quantizer.named_parameters()] == ["log_scale"]
    with torch.no_grad():
        quantizer.log_scale += 1.0
    assert quantizer.range().high == pytest.approx(6.0, rel=1e-5)
    assert quantizer(torch.tensor([9.0])).item() == pytest.approx(6.0, rel=1e-5)
    quantizer(torch.tensor([9.0])).sum().backward()
    assert quantizer.log_scale.grad.item() > 0  # it can come back


def test_where_it_clips_alone_values_inside_stay_as_they_are():
    quantizer = FakeQuantize(RANGE, UINT8, clip_only=True)
    values = torch.tensor([-5.0, 0.1003, 5.0], requires_grad=True)
    scale, zero = (float(part) for part in UINT8.parameters(RANGE))
    clipped = quantizer(values)
    assert clipped.tolist() == pytest.approx([-zero * scale, 0.1003, (255 - zero) * scale], rel=1e-6)
    clipped.sum().backward()
    assert values.grad.tolist() == [0.0, 1.0, 0.0]
    assert quantizer.log_scale.grad.item() == pytest.approx(scale * (255 - 2 * zero), rel=1e-4)


@pytest.mark.parametrize("reduce_range", [False, True])
def test_a_weight_begins_with_the_plans_integers(reduce_range):
    weight = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    integers, scales = quantize_weight(weight.numpy(), 0, reduce_range=reduce_range)
    integers[0, 0, 0, 0] += 1  # as another rounding would have it
    quantizer = FakeQuantizedWeight(weight, integers, scales, reduce_range=False)
    found, steps = quantizer.quantized()
    assert np.array_equal(found, integers)
    assert np.allclose(steps, scales, rtol=1e-5)
    expected = integers * scales.reshape(-1, 1, 1, 1)
    assert np.allclose(quantizer().detach().numpy(), expected, atol=1e-5)


def test_a_reduced_range_follows_the_weight():
    weight = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    integers, scales = quantize_weight(weight.numpy(), 0, reduce_range=True)
    quantizer = FakeQuantizedWeight(weight, integers, scales, reduce_range=True)
    with torch.no_grad():
        quantizer.weight[0] *= 2
    found, steps = quantizer.quantized()
    assert steps[0] == pytest.approx(2 * scales[0], rel=1e-5)
    ordered = np.sort(np.abs(found.reshape(6, -1)) * (found.reshape(6, -1) > 0), axis=1)
    assert (ordered[:, -1].astype(int) + ordered[:, -2] <= 128).all()
    assert np.allclose(quantizer().detach().numpy(), found * steps.reshape(-1, 1, 1, 1), atol=1e-5)
    quantizer().square().sum().backward()
    assert quantizer.log_scales.grad is None
    assert quantizer.weight.grad.abs().sum() > 0


def test_a_bias_is_rounded_to_the_steps_of_its_products():
    weight = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    integers, scales = quantize_weight(weight.numpy(), 0, reduce_range=False)
    activation = FakeQuantize(RANGE, UINT8)
    quantizer = FakeQuantizeBias(activation, FakeQuantizedWeight(weight, integers, scales, reduce_range=False))
    bias = torch.linspace(-1, 1, 6).requires_grad_()
    steps = scales.astype(np.float64) * float(UINT8.parameters(RANGE)[0])
    rounded = quantizer(bias)
    assert np.allclose(rounded.detach().numpy(), np.round(bias.detach().numpy() / steps) * steps, atol=1e-6)
    rounded.sum().backward()
    assert bias.grad.eq(1).all()
    assert not quantizer.state_dict()  # what it rounds by is in that of the others
    shifted = FakeQuantizeBias(*quantizer._factors, offset=0.3)(bias).detach().numpy()
    assert np.allclose(shifted + 0.3, np.round((bias.detach().numpy() + 0.3) / steps) * steps, atol=1e-6)
    assert not np.allclose(shifted, rounded.detach().numpy(), atol=1e-4)
    with torch.no_grad():
        activation.log_scale += 10
    assert quantizer(bias).abs().max() == 0  # it follows the ranges
