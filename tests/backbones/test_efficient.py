"""EfficientNet, EfficientNet-Lite and EfficientNetV2 against timm."""

import pytest
import torch

from deploykit.backbones.base import BackboneOptions
from deploykit.backbones.efficient import EfficientNet
from deploykit.backbones.inverted_residual import Conv2dSame, conv2d
from deploykit.backbones.resnet import ResNet
from deploykit.errors import SpecError
from tests.backbones import against_timm
from tests.backbones.realistic import randomize

FAST = {"efficientnet_b0", "tf_efficientnet_lite0"}
FAST_DILATED = {("tf_efficientnet_lite0", 8), ("efficientnet_lite1", 16), ("tf_efficientnetv2_s", 16)}


@pytest.mark.parametrize("name", against_timm.variants(EfficientNet.variants, fast=FAST))
def test_features_and_logits_equal_timms(timm, name):
    against_timm.assert_equals_timm(timm, EfficientNet, name)


@pytest.mark.parametrize(
    ("name", "output_stride"),
    [
        pytest.param(name, stride, marks=() if (name, stride) in FAST_DILATED else pytest.mark.slow)
        for name in EfficientNet.variants
        for stride in (8, 16)
    ],
)
def test_output_stride_by_dilation_equals_timms(timm, name, output_stride):
    against_timm.assert_dilates_as_timm(timm, EfficientNet, name, output_stride)


def test_embedding_is_timms(timm):
    against_timm.assert_embedding_is_timms(timm, EfficientNet, "efficientnet_b0")


def test_default_weights_are_timms(timm):
    for name, variant in EfficientNet.variants.items():
        expected, source = timm.get_pretrained_cfg(name), variant.pretrained
        assert expected.hf_hub_id == (f"timm/{name}.{source.tag}" if source.tag else None)
        assert source.image_size == expected.input_size[1:], name
        for field in ("mean", "std", "interpolation", "crop_pct", "crop_mode"):
            assert getattr(source.preprocessing, field) == getattr(expected, field), (name, field)


@torch.no_grad()
@pytest.mark.parametrize("size", [(75, 107), (96, 65)])
def test_same_padding_of_odd_sizes_equals_timms(timm, size):
    reference = randomize(timm.create_model("tf_efficientnet_lite0")).eval()
    ours = EfficientNet("tf_efficientnet_lite0", BackboneOptions()).eval()
    ours.load_state_dict(reference.state_dict())
    images = torch.randn(1, 3, *size)
    against_timm.assert_close(ours(images), reference(images))


def test_same_padding_is_in_the_convolution_where_it_is_symmetric():
    assert type(conv2d(8, 8, 3, padding="same")) is torch.nn.Conv2d
    assert type(conv2d(8, 8, 3, stride=2, padding="same")) is Conv2dSame


def test_checkpointing_keeps_the_gradients():
    against_timm.assert_gradients_survive_checkpointing(EfficientNet, "efficientnet_lite0")


@pytest.mark.parametrize(("level", "side"), [(0, 64), (2, 192)])
def test_receptive_field_is_what_the_gradient_reaches(level, side):
    model = randomize(EfficientNet("efficientnet_lite0", BackboneOptions())).eval()
    field = model.all_levels[level].receptive_field
    assert against_timm.measured_receptive_field(model, level, side) == field


def test_weights_can_ask_for_another_padding():
    options = BackboneOptions(architecture=(("padding", "same"), ("bn_eps", 1e-3)))
    model = EfficientNet("efficientnet_lite0", options)
    assert isinstance(model.conv_stem, Conv2dSame)
    assert model.bn1.eps == 1e-3


def test_a_family_without_that_field_refuses():
    with pytest.raises(SpecError, match="ask for another padding"):
        ResNet("resnet18", BackboneOptions(architecture=(("padding", "same"),)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "features_only"),
    [
        ("tf_efficientnet_lite0", True),
        ("tf_efficientnet_b0", False),
        ("efficientnetv2_s", False),
    ],
)
def test_exports_to_plain_operators(tmp_path, name, features_only):
    # A side of 136 gives odd maps, and a last one large enough for the statistics of a deep network.
    against_timm.assert_exports(EfficientNet, name, tmp_path / "model.onnx", side=136, features_only=features_only)
