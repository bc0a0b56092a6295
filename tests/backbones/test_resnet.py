"""ResNet, ResNeXt, Wide ResNet, ResNet-D, SE-ResNet and ResNetV2 against timm."""

import pytest
import torch

from deploykit.backbones.base import BackboneOptions
from deploykit.backbones.resnet import ResNet
from deploykit.backbones.resnetv2 import ResNetV2
from tests.backbones import against_timm
from tests.backbones.realistic import randomize

FAST = {"resnet18", "resnet18d"}
FAST_DILATED = {("resnet18d", 8), ("resnext50_32x4d", 16), ("seresnet50", 16), ("resnetv2_50", 8)}
ALL = {**dict.fromkeys(ResNet.variants, ResNet), **dict.fromkeys(ResNetV2.variants, ResNetV2)}


@pytest.mark.parametrize("name", against_timm.variants(ALL, fast=FAST))
def test_features_and_logits_equal_timms(timm, name):
    against_timm.assert_equals_timm(timm, ALL[name], name)


@pytest.mark.parametrize(
    ("name", "output_stride"),
    [
        pytest.param(name, stride, marks=() if (name, stride) in FAST_DILATED else pytest.mark.slow)
        for name in ALL
        for stride in (8, 16)
    ],
)
def test_output_stride_by_dilation_equals_timms(timm, name, output_stride):
    against_timm.assert_dilates_as_timm(timm, ALL[name], name, output_stride)


@pytest.mark.parametrize("name", ["resnet18", "resnetv2_50"])
def test_embedding_is_timms(timm, name):
    against_timm.assert_embedding_is_timms(timm, ALL[name], name)


@pytest.mark.parametrize("family", [ResNet, ResNetV2])
def test_default_weights_are_timms(timm, family):
    against_timm.assert_sources_are_timms(timm, family)


@torch.no_grad()
def test_average_pooling_of_an_odd_map_equals_timms(timm):
    reference = randomize(timm.create_model("resnet18d")).eval()
    ours = ResNet("resnet18d", BackboneOptions()).eval()
    ours.load_state_dict(reference.state_dict())
    images = torch.randn(1, 3, 75, 107)
    against_timm.assert_close(ours(images), reference(images))


def test_checkpointing_keeps_the_gradients():
    against_timm.assert_gradients_survive_checkpointing(ResNet, "resnet18")


@pytest.mark.parametrize(("name", "level", "side"), [("resnet18", 0, 64), ("resnet18", 2, 160), ("resnet18d", 1, 96)])
def test_receptive_field_is_what_the_gradient_reaches(name, level, side):
    model = randomize(ResNet(name, BackboneOptions())).eval()
    field = model.all_levels[level].receptive_field
    assert against_timm.measured_receptive_field(model, level, side) == field


def test_squeeze_and_excitation_sees_the_whole_image():
    fields = [level.receptive_field for level in ResNet("seresnet50", BackboneOptions()).all_levels]
    assert fields == [7, 0, 0, 0, 0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "features_only"),
    [
        ("resnet18d", True),
        *((name, False) for name in ("resnet18", "seresnet50", "resnetv2_50")),
    ],
)
def test_exports_to_plain_operators(tmp_path, name, features_only):
    # A side of 72 gives stage4 an odd map to pool.
    # A pre-activation has a norm with no convolution before it, which torch.onnx.export leaves as it is.
    also = ("BatchNormalization",) if name == "resnetv2_50" else ()
    path = tmp_path / "model.onnx"
    against_timm.assert_exports(ALL[name], name, path, side=72, also=also, features_only=features_only)
