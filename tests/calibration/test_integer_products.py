"""Layers of rounded values against the same sums in Python's integers, and their gradients against torch's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from deploykit.calibration.fake_quantize import FakeQuantize, FakeQuantizedWeight
from deploykit.calibration.integer_products import IntegerProducts, IntegerProductsEachCall
from deploykit.calibration.quantize_activations import UINT8
from deploykit.calibration.ranges import ActivationRange, quantize_weight

CONVOLUTION = torch.ops.aten.conv2d.default, (6, 5, 3, 3), (4, 5, 9, 9), ([2, 2], [1, 1])
LINEAR = torch.ops.aten.linear.default, (6, 5), (4, 7, 3, 5), ()


@pytest.fixture(params=[CONVOLUTION, LINEAR], ids=["convolution", "linear"])
def layer(request):
    """A layer's call, its weight and what rounds it, a map in float, and the rest of its arguments."""
    call, shape, images, arguments = request.param
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    rounding = FakeQuantizedWeight(weight, *quantize_weight(weight.numpy(), 0, reduce_range=False), reduce_range=False)
    return call, rounding, torch.randn(images, generator=generator), arguments


def in_integers(call, integers, rounding, arguments):
    """The sums in double, which holds them all."""
    weight, steps = rounding.quantized()
    sums = call(torch.from_numpy(integers).double(), torch.from_numpy(weight).double(), None, *arguments).numpy()
    return sums, steps.reshape(-1, *[1] * (weight.ndim - 2))


def test_sums_are_of_integers(layer):
    call, rounding, values, arguments = layer
    activation = FakeQuantize(ActivationRange(low=-2.0, high=3.0, amax=3.0), UINT8)
    bias = torch.linspace(-1, 1, 6)
    rounded = activation(values)
    found = IntegerProducts(call, activation, rounding, arguments)(rounded, rounding(), bias).detach().numpy()
    step = activation.scale().item()
    sums, steps = in_integers(call, np.rint(rounded.detach().numpy() / step), rounding, arguments)
    exact = sums * np.float32(step * steps) + bias.numpy().reshape(steps.shape)
    assert np.abs(found - exact).max() <= 2e-7 * np.abs(exact).max()


def test_gradients_are_those_of_the_layer_itself(layer):
    call, rounding, values, arguments = layer
    activation = FakeQuantize(ActivationRange(low=-2.0, high=3.0, amax=3.0), UINT8)
    bias = torch.linspace(-1, 1, 6).requires_grad_()
    learned = values.requires_grad_(), rounding.weight, rounding.log_scales, activation.log_scale, bias

    def gradients(compute):
        out = compute(activation(values), rounding(), bias)
        return torch.autograd.grad((out * torch.linspace(-1, 1, out.shape[-1])).sum(), learned)

    expected = gradients(lambda *operands: call(*operands, *arguments))
    found = gradients(IntegerProducts(call, activation, rounding, arguments))
    for one, other in zip(expected, found, strict=True):
        assert (one - other).norm() <= 1e-4 * one.norm()


def test_each_image_has_a_range_of_its_own_where_the_call_decides():
    weight = torch.eye(5)
    rounding = FakeQuantizedWeight(weight, *quantize_weight(weight.numpy(), 0, reduce_range=False), reduce_range=False)
    images = torch.stack([torch.linspace(-1, 1, 500), torch.linspace(0, 1000, 500)]).reshape(2, 100, 5).requires_grad_()
    rounded = IntegerProductsEachCall(F.linear, rounding, ())(images, rounding(), torch.full((5,), 2.0)) - 2
    assert (rounded[0] - images[0]).abs().max() <= 2 / 255 / 2 + 1e-5
    assert (rounded[1] - images[1]).abs().max() <= 1000 / 255 / 2 + 1e-2
    rounded.sum().backward()
    assert images.grad.sub(1).abs().max() < 1e-5


def test_autocast_leaves_sums_in_float32(layer):
    call, rounding, values, arguments = layer
    activation = FakeQuantize(ActivationRange(low=-2.0, high=3.0, amax=3.0), UINT8)
    rounded = activation(values)
    products = (
        IntegerProducts(call, activation, rounding, arguments),
        IntegerProductsEachCall(call, rounding, arguments),
    )
    for each in products:
        expected = each(rounded, rounding())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(each(rounded, rounding()), expected)
