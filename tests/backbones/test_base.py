"""What every family gets from BaseBackbone."""

import pytest
import torch

from deploykit.backbones.base import BackboneOptions
from deploykit.backbones.memory_efficient import memory_efficient
from deploykit.backbones.registry import build_backbone
from deploykit.errors import SpecError
from tests.small_resnet import SMALL


def trained(name, *, checkpointing, wrap=lambda model: model, frozen=None, backwards=1):
    """Two steps' gradients and the running statistics after them, by name."""
    torch.manual_seed(0)
    model = wrap(build_backbone(name, BackboneOptions(num_classes=10)).train())
    model.set_grad_checkpointing(checkpointing)
    model.freeze(frozen)
    for _ in range(2):
        loss = model(torch.randn(4, 3, 64, 64)).square().mean()
        for again in reversed(range(backwards)):
            loss.backward(retain_graph=bool(again))
    gradients = {key: value.grad for key, value in model.named_parameters() if value.grad is not None}
    return gradients, dict(model.named_buffers())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet18", {}),
        ("resnet18", {"frozen": "stage1"}),
        ("resnet18", {"backwards": 2}),
        ("resnet18", {"wrap": memory_efficient}),
        ("mobilenetv3_small_100", {}),
        ("regnety_002", {}),
    ],
    ids=["plain", "frozen stage", "two backward passes", "memory efficient", "mobilenet", "regnet"],
)
def test_checkpointing_changes_no_gradient_and_no_statistic(name, options):
    plain = trained(name, checkpointing=False, **options)
    for expected, found in zip(plain, trained(name, checkpointing=True, **options), strict=True):
        assert expected.keys() == found.keys()
        assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    if "frozen" not in options:
        assert {int(value) for key, value in plain[1].items() if key.endswith("num_batches_tracked")} == {2}


def test_memory_efficient_training_moves_statistics_once():
    plain = trained("resnet18", checkpointing=False)[1]
    efficient = trained("resnet18", checkpointing=False, wrap=memory_efficient)[1]
    assert [key for key in plain if not torch.equal(plain[key], efficient[key])] == []


def test_a_level_that_is_not_there_is_not_frozen_up_to():
    model = build_backbone(SMALL, BackboneOptions())
    with pytest.raises(SpecError, match=r"has no level 'stage5' to freeze up to\. .*'stage4'"):
        model.freeze("stage5")
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 3, 64, 64, dtype=torch.int64), r"the images are \(1, 3, 64, 64\) torch\.int64; expected"),
        (torch.zeros(1, 4, 64, 64, dtype=torch.float16), r"the images are \(1, 4, 64, 64\) torch\.float16; expected"),
    ],
    ids=["integers", "channels"],
)
def test_images_that_the_model_cannot_take_are_named(images, message):
    with pytest.raises(SpecError, match=message):
        build_backbone(SMALL, BackboneOptions())(images)


def test_half_precision_gives_float32_of_logits_as_of_features():
    images = torch.randn(1, 3, 64, 64)
    for features_only in (False, True):
        model = build_backbone(SMALL, BackboneOptions(features_only=features_only)).eval()
        expected, found = model(images), model.to(torch.bfloat16)(images.to(torch.bfloat16))
        pairs = [(expected, found)] if not features_only else zip(expected.values(), found.values(), strict=True)
        for one, other in pairs:
            assert other.dtype == torch.float32
            torch.testing.assert_close(other, one, rtol=0.1, atol=0.1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_checkpointing_compiles_and_moves_statistics_once():
    def compiled(model):
        model.forward = torch.compile(model.forward, backend="aot_eager")
        return model

    _, plain = trained("resnet18", checkpointing=False)
    _, found = trained("resnet18", checkpointing=True, wrap=compiled)
    for key, expected in plain.items():
        torch.testing.assert_close(found[key], expected, rtol=1e-4, atol=1e-6)
