"""ConvNeXt V1 and V2 against timm, and as graphs."""

from typing import ClassVar

import pytest
import torch

from deploykit.backbones.base import BackboneOptions
from deploykit.backbones.convnext import VARIANTS, ConvNeXt, ConvNeXtVariant
from deploykit.errors import SpecError
from tests.backbones import against_timm, channels_last
from tests.backbones.realistic import randomize


def _small(*, conv_mlp, response_norm):
    return ConvNeXtVariant(
        depths=(1, 1, 2, 1), widths=(16, 24, 32, 48), conv_mlp=conv_mlp, response_norm=response_norm, pretrained=None
    )


class Small(ConvNeXt):
    variants: ClassVar = {
        "v1_conv": _small(conv_mlp=True, response_norm=False),
        "v1_linear": _small(conv_mlp=False, response_norm=False),
        "v2_conv": _small(conv_mlp=True, response_norm=True),
        "v2_linear": _small(conv_mlp=False, response_norm=True),
    }


def timms_shape(name):
    """The architecture of a small variant in timm's words."""
    return {"depths": Small.variants[name].depths, "dims": Small.variants[name].widths}


@pytest.mark.parametrize("name", against_timm.variants(VARIANTS, fast={"convnext_atto"}))
def test_state_dict_logits_features_and_levels_are_timms(timm, name):
    channels_last.assert_equals_timm(timm, ConvNeXt, name, (224, 224))
    channels_last.assert_equals_timm(timm, ConvNeXt, name, (96, 160))


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("v1_conv", "convnext_atto"),
        ("v1_linear", "convnext_tiny"),
        ("v2_conv", "convnextv2_atto"),
        ("v2_linear", "convnextv2_tiny"),
    ],
)
def test_each_kind_of_block_is_timms_at_a_size_that_strides_do_not_divide(timm, name, reference):
    channels_last.assert_equals_timm(timm, Small, name, (70, 90), reference_name=reference, **timms_shape(name))


@pytest.mark.parametrize("output_stride", [8, 16])
def test_dilation_is_timms(timm, output_stride):
    channels_last.assert_equals_timm(
        timm,
        Small,
        "v1_conv",
        (96, 160),
        output_stride=output_stride,
        reference_name="convnext_atto",
        **timms_shape("v1_conv"),
    )


def test_embedding_is_timms(timm):
    shape = {"num_classes": 0, **timms_shape("v2_linear")}
    reference = randomize(timm.create_model("convnextv2_tiny", **shape)).eval()
    ours = channels_last.load(Small, "v2_linear", reference.state_dict(), num_classes=0)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        against_timm.assert_close(ours(images), reference(images))


def test_default_weights_and_preprocessing_are_timms(timm):
    against_timm.assert_sources_are_timms(timm, ConvNeXt)


def test_receptive_fields_are_the_measured_ones():
    model = randomize(ConvNeXt("convnext_atto", BackboneOptions(features_only=True))).eval()
    stated = [level.receptive_field for level in model.all_levels[:2]]
    assert stated == [against_timm.measured_receptive_field(model, level, side=256) for level in range(2)]


def test_response_norm_sees_the_whole_image():
    model = randomize(Small("v2_conv", BackboneOptions(features_only=True))).eval()
    assert [level.receptive_field for level in model.feature_info] == [0, 0, 0, 0]
    assert against_timm.measured_receptive_field(model, 0, side=96) == 96


def test_stride_2_level_is_refused_with_those_that_there_are():
    with pytest.raises(SpecError, match=r"1 \(stage1, stride 4\)"):
        ConvNeXt("convnext_atto", BackboneOptions(features_only=True, output_indices=(0, 1)))


def test_gradients_survive_checkpointing():
    model = randomize(Small("v1_linear", BackboneOptions(num_classes=10))).train()
    channels_last.assert_gradients_survive_checkpointing(model, torch.randn(2, 3, 64, 64))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v1_linear", "v2_conv"])
def test_exports_with_a_dynamic_batch(name, tmp_path):
    model = randomize(Small(name, BackboneOptions(image_size=(64, 96), num_classes=10)))
    also = ("ReduceL2", "Div") if name.startswith("v2") else ()
    found = channels_last.assert_exports(model, tmp_path / "convnext.onnx", also=also)
    # Two permutations around each LayerNorm (five blocks, the stem, three downsamplings), none elsewhere.
    assert found["Transpose"] == 18
    assert found["Reshape"] == 0


def test_exports_with_dilation(tmp_path):
    model = randomize(Small("v1_conv", BackboneOptions(image_size=(64, 96), output_stride=8)))
    channels_last.assert_exports(model, tmp_path / "convnext.onnx", also=("Pad",))


def test_a_shallow_level_does_not_run_the_deep_stages():
    model = Small("v1_conv", BackboneOptions(features_only=True, output_indices=(1,))).eval()
    model.stages[1].blocks[0].register_forward_hook(lambda *_: pytest.fail("stage 2 ran"))
    assert list(model(torch.randn(1, 3, 64, 64))) == ["stage1"]
