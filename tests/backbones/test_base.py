"""What every family gets from BaseBackbone."""

import pytest
import torch

from deploykit.backbones.base import BackboneOptions
from deploykit.backbones.memory_efficient import memory_efficient
from deploykit.backbones.registry import build_backbone


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
