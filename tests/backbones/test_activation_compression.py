"""Compressed activations: bounds of the values and of the gradients, and what is left alone."""

import gc

import pytest
import torch
from torch import nn

from deploykit.backbones.activation_compression import compressed_activations
from deploykit.backbones.base import BackboneOptions
from deploykit.backbones.registry import build
from deploykit.errors import DeployKitError, SpecError
from tests.backbones.realistic import randomize


class Keep(torch.autograd.Function):
    """Saves its input; its gradient is what autograd gave back."""

    @staticmethod
    def forward(ctx, tensor):
        ctx.save_for_backward(tensor)
        return tensor.sum()

    @staticmethod
    def backward(ctx, gradient):
        return ctx.saved_tensors[0].clone()


def through(tensor, **settings):
    """The tensor as it comes back in the backward pass."""
    leaf = tensor.detach().requires_grad_()
    with compressed_activations(**settings):
        total = Keep.apply(leaf)
    total.backward()
    return leaf.grad


def in_the_graph(*kinds):
    """How many objects of these classes live; without collecting cycles, which training should not make."""
    return sum(type(item).__name__ in kinds for item in gc.get_objects())


@pytest.mark.parametrize("shape", [(2, 8, 16, 16), (4, 32, 64), (64, 128), (3, 64, 5, 5), (2, 4096, 1, 1)])
@pytest.mark.parametrize("offset", [0.0, 3.0, 1000.0])
def test_eight_bits_stay_within_the_bound_of_their_group(shape, offset):
    torch.manual_seed(0)
    tensor = torch.randn(shape) * 10 ** torch.randn(shape[0], *[1] * (len(shape) - 1)) + offset
    back = through(tensor, bits=8, min_size=1)
    dims = {2: (1,), 3: (2,), 4: (2, 3) if shape[-1] == 16 else (1, 2, 3)}[len(shape)]
    bound = (tensor.amax(dims, keepdim=True) - tensor.amin(dims, keepdim=True)) / 254
    assert ((back - tensor).abs() <= bound * 1.001 + tensor.abs().amax() * 1e-6).all()
    assert (back - tensor).abs().max() > 0


def test_eight_bits_keep_zeros_and_signs():
    torch.manual_seed(0)
    tensor = torch.randn(2, 4, 32, 32).relu() * torch.logspace(-6, 0, 32)
    assert torch.equal(through(tensor, bits=8).sign(), tensor.sign())
    tensor = torch.randn(2, 4, 32, 32) * torch.logspace(-6, 0, 32)
    assert torch.equal(through(tensor, bits=8).sign(), tensor.sign())


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_sixteen_bits_stay_within_their_bound_at_any_scale(scale):
    torch.manual_seed(0)
    tensor = torch.randn(64, 128) * scale
    back = through(tensor, bits=16)
    assert ((back - tensor).abs() <= tensor.abs() * 2.0**-11 + tensor.abs().amax() * 2.0**-39).all()
    assert not torch.equal(back, tensor)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize(
    "tensor",
    [
        torch.full((64, 128), float("nan")),
        torch.full((64, 128), float("inf")),
        torch.randn(8, 8),
        torch.randn(1, 128).expand(64, 128),
        torch.randn(64, 128, dtype=torch.float64),
        torch.zeros(64, 128),
    ],
    ids=["nan", "inf", "small", "expanded", "double", "zeros"],
)
def test_what_packing_would_hurt_is_left_alone(tensor, bits):
    torch.testing.assert_close(through(tensor, bits=bits), tensor, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bits", [8, 16])
def test_gradient_of_a_linear_layer_is_within_the_stated_bound(bits):
    torch.manual_seed(0)
    layer, images, pull = nn.Linear(128, 32), torch.randn(64, 128), torch.randn(64, 32)
    with compressed_activations(bits=bits):
        output = layer(images)
    assert torch.equal(output, layer(images))
    output.backward(pull)
    low, high = images.amin(1, keepdim=True), images.amax(1, keepdim=True)
    step = ((high - low) / 254).expand_as(images) if bits == 8 else images.abs() * 2.0**-11
    error = (layer.weight.grad - pull.T @ images).abs()
    assert (error <= pull.abs().T @ step * 1.001 + 1e-5).all()
    assert error.max() > 0


def test_gradient_through_the_weights_is_exact():
    torch.manual_seed(0)
    layer, images = nn.Linear(128, 128), torch.randn(64, 128, requires_grad=True)
    with compressed_activations(bits=8, min_size=1):
        layer(images).sum().backward()
    torch.testing.assert_close(images.grad, layer.weight.sum(0).expand(64, -1))


@pytest.mark.parametrize(
    ("name", "bits", "bound"),
    [("resnet18", 8, 0.02), ("resnet18", 16, 0.001), ("vit_tiny_patch16_224", 8, 0.02)],
)
def test_gradients_of_a_backbone_are_close_and_its_outputs_exact(name, bits, bound):
    torch.manual_seed(0)
    model = randomize(build(name, BackboneOptions(num_classes=10, image_size=(64, 64)))).train()
    images = torch.randn(4, 3, 64, 64)
    plain = model(images)
    plain.square().sum().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    with compressed_activations(bits=bits, min_size=256):
        output = model(images)
    output.square().sum().backward()
    assert torch.equal(output, plain)
    error = torch.stack([(p.grad - e).norm() for p, e in zip(model.parameters(), expected, strict=True)]).norm()
    assert 0 < error / torch.stack([e.norm() for e in expected]).norm() <= bound


def test_a_tensor_that_two_operators_save_is_packed_once():
    before = in_the_graph("Packed8")
    tensor = torch.randn(64, 128, requires_grad=True) * 1
    with compressed_activations(bits=8):
        # Saved: exp's output by exp and sin, tensor by cos and sin, and the product's two factors.
        outputs = tensor.exp().sin() * tensor.cos() + tensor.sin()
    assert outputs.requires_grad
    assert in_the_graph("Packed8") - before == 4


def test_saved_tensors_are_freed_with_the_graph():
    before = in_the_graph("Packed8", "Kept")
    layer = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128))
    with compressed_activations(bits=8):
        output = layer(torch.randn(64, 128)).relu()
    assert in_the_graph("Packed8", "Kept") > before
    del output
    assert in_the_graph("Packed8", "Kept") == before


def test_a_kept_tensor_that_changes_before_the_backward_pass_is_refused():
    tensor = torch.randn(8, 8, requires_grad=True) * 1
    with compressed_activations():
        output = tensor.sin().sum()
    tensor.add_(1)
    with pytest.raises(DeployKitError, match="modified in place"):
        output.backward()


def test_other_bits_are_refused():
    with pytest.raises(SpecError, match="8 or 16"), compressed_activations(bits=4):
        pass
