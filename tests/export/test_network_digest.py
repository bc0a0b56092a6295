"""What the key of a cached engine sees of a network beside its weights."""

import pytest
import torch
from torch import nn

from deploykit import create_backbone
from deploykit.backbones.user_module import wrap_module
from deploykit.export.network_digest import network_digest
from deploykit.spec import InputSpec

SPEC = InputSpec(height=16, width=16)


class Net(nn.Module):
    """One convolution and a function of its map."""

    def __init__(self, act, **settings):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, 2, 1)
        self.act = act
        for name, value in settings.items():
            setattr(self, name, value)

    def forward(self, images):
        return self.act(self, self.conv(images))


def digest(act, **settings):
    return network_digest(wrap_module(Net(act, **settings), 16), SPEC)


def scaled(net, features):
    return features * net.scale


def test_the_same_code_has_the_same_digest():
    assert digest(scaled, scale=2.0) == digest(scaled, scale=2.0)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((lambda net, x: x.relu(), {}), (lambda net, x: x.sigmoid(), {})),
        ((scaled, {"scale": 2.0}), (scaled, {"scale": 3.0})),
        ((scaled, {"scale": torch.tensor(2.0)}), (scaled, {"scale": torch.tensor(3.0)})),
        ((lambda net, x: net.last(x), {"last": nn.ReLU()}), (lambda net, x: net.last(x), {"last": nn.SiLU()})),
    ],
)
def test_other_code_settings_and_plain_tensors_have_another_digest(one, other):
    assert digest(one[0], **one[1]) != digest(other[0], **other[1])


def test_a_changed_layer_of_a_named_backbone_has_another_digest():
    backbone = create_backbone("resnet18", image_size=32)
    before = network_digest(backbone, InputSpec(height=32, width=32))
    backbone.layer1[0].act1 = nn.GELU()
    assert network_digest(backbone, InputSpec(height=32, width=32)) != before
