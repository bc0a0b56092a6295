"""memory_efficient: the same training with less kept."""

import copy
import gc

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from deploykit.backbones.activation_compression import compressed_activations
from deploykit.backbones.base import BackboneOptions
from deploykit.backbones.memory_efficient import memory_efficient
from deploykit.backbones.registry import build
from deploykit.errors import DeployKitError
from tests.backbones.realistic import randomize

NAMES = ["resnet18", "efficientnet_b0", "mobilenetv3_large_100", "vit_tiny_patch16_224"]


def backbone(name, side=32):
    torch.manual_seed(0)
    return randomize(build(name, BackboneOptions(num_classes=10, image_size=(side, side)))).train()


def kept_bytes():
    """The bytes of all storages that autograd keeps as they are; cycles, which training should not make, count."""
    kept = [item for item in gc.get_objects() if type(item).__name__ == "Kept"]
    storages = {item._tensor.untyped_storage().data_ptr(): item._tensor.untyped_storage().nbytes() for item in kept}
    return sum(storages.values())


def saved_bytes(model, images):
    """The bytes of all storages that plain autograd keeps."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(images)
    assert output.requires_grad
    return sum(storages.values())


def step(model, images):
    torch.manual_seed(1)
    output = model(images)
    output.square().sum().backward()
    return [output.detach(), *(parameter.grad for parameter in model.parameters()), *model.buffers()]


@pytest.mark.parametrize("name", NAMES)
def test_a_training_step_is_equal_to_the_last_bit(name):
    plain, efficient = backbone(name), memory_efficient(backbone(name))
    images = torch.randn(4, 3, 32, 32)
    for expected, got in zip(step(plain, images), step(efficient, images), strict=True):
        assert torch.equal(expected, got)


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_gradients_survive_checkpointing_to_the_last_bit(name):
    plain, checkpointed = backbone(name).eval(), backbone(name).eval()
    # Training mode of the root alone: BatchNorm's statistics move twice when a stage runs twice.
    plain.training = checkpointed.training = True
    checkpointed.set_grad_checkpointing()
    images = torch.randn(2, 3, 32, 32)
    for expected, got in zip(step(plain, images), step(checkpointed, images), strict=True):
        assert torch.equal(expected, got)


@pytest.mark.parametrize(("name", "share"), list(zip(NAMES, (0.75, 0.75, 0.9, 0.8), strict=True)))
def test_less_is_kept(name, share):
    model, images = backbone(name, 64), torch.randn(4, 3, 64, 64)
    weight_bytes = sum(parameter.nbytes for parameter in model.parameters())
    plain = saved_bytes(model, images) - weight_bytes
    gc.collect()
    before = kept_bytes()
    output = memory_efficient(model)(images)
    assert output.requires_grad
    assert kept_bytes() - before - weight_bytes <= share * plain


def test_state_dict_and_evaluation_stay_the_same():
    plain, efficient = backbone("resnet18").eval(), memory_efficient(memory_efficient(backbone("resnet18"))).eval()
    images = torch.randn(1, 3, 32, 32)
    assert list(plain.state_dict()) == list(efficient.state_dict())
    assert torch.equal(plain(images), efficient(images))
    program = torch.export.export(efficient, (images,))
    assert torch.equal(program.module()(images), plain(images))


def test_a_copy_trains_on_its_own():
    model = memory_efficient(backbone("resnet18"))
    twin, images = copy.deepcopy(model), torch.randn(2, 3, 32, 32)
    for expected, got in zip(step(model, images), step(twin, images), strict=True):
        assert torch.equal(expected, got)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish])
@pytest.mark.parametrize("training", [True, False])
def test_every_layer_kind_is_exact(activation, training):
    def build_one():
        torch.manual_seed(0)
        layers = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), activation(),
            nn.Conv2d(8, 8, 3), nn.GroupNorm(2, 8), activation(),
            nn.Flatten(2), nn.Linear(144, 16), nn.LayerNorm(16), activation(), nn.Linear(16, 4),
        )  # fmt: skip
        layers[1].train(training)
        return layers

    images = torch.randn(2, 3, 16, 16)
    for expected, got in zip(step(build_one(), images), step(memory_efficient(build_one()), images), strict=True):
        assert torch.equal(expected, got)


def test_a_weight_that_changes_before_the_backward_pass_is_refused():
    model = memory_efficient(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.SiLU(), nn.Conv2d(4, 4, 1)))
    output = model(torch.randn(2, 3, 8, 8)).sum()
    with torch.no_grad():
        model[1].bias.add_(1)
    with pytest.raises(DeployKitError, match="changed between forward and backward"):
        output.backward()


def test_an_error_in_the_forward_pass_leaves_plain_autograd():
    class Fails(nn.Module):
        def forward(self, images):
            raise ValueError("no")

    model = memory_efficient(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), Fails()))
    with pytest.raises(ValueError, match="no"):
        model(torch.randn(1, 3, 4, 4))
    before = kept_bytes()
    output = torch.randn(4, requires_grad=True).exp()
    assert output.requires_grad
    assert kept_bytes() == before


def test_works_inside_checkpoints_compression_and_other_efficient_models():
    images = torch.randn(2, 3, 32, 32)
    expected = step(backbone("resnet18"), images)
    nested = memory_efficient(nn.Sequential(memory_efficient(backbone("resnet18"))))
    for wanted, got in zip(expected, step(nested, images), strict=True):
        assert torch.equal(wanted, got)
    model = memory_efficient(backbone("resnet18"))
    checkpoint(model, images, use_reentrant=False).square().sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    for wanted, got in zip(expected[1:], gradients, strict=False):
        assert torch.equal(wanted, got)
    with compressed_activations():
        assert torch.equal(memory_efficient(backbone("resnet18"))(images).detach(), expected[0])


def test_saved_tensors_are_freed_with_the_graph():
    model = memory_efficient(backbone("resnet18"))
    gc.collect()
    before = kept_bytes()
    output = model(torch.randn(2, 3, 32, 32))
    assert kept_bytes() > before
    del output
    assert kept_bytes() == before
