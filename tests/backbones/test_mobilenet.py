"""MobileNet V2, V3 and V4 against timm, and as graphs."""

import pytest
import torch

from deploykit.backbones.base import BackboneOptions
from deploykit.backbones.mobilenet import VARIANTS, MobileNet
from tests.backbones import against_timm
from tests.backbones.realistic import randomize

GENERATIONS = ("mobilenetv2_050", "mobilenetv3_small_075", "mobilenetv4_conv_small")


@pytest.mark.parametrize("name", against_timm.variants(VARIANTS, fast={*GENERATIONS, "mobilenetv3_large_075"}))
def test_state_dict_logits_features_and_levels_are_timms(timm, name):
    against_timm.assert_equals_timm(timm, MobileNet, name)


@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize("name", GENERATIONS)
def test_dilated_features_are_timms(timm, name, output_stride):
    against_timm.assert_dilates_as_timm(timm, MobileNet, name, output_stride)


@pytest.mark.parametrize("name", GENERATIONS)
def test_embedding_is_timms(timm, name):
    against_timm.assert_embedding_is_timms(timm, MobileNet, name)


def test_default_weights_and_preprocessing_are_timms(timm):
    against_timm.assert_sources_are_timms(timm, MobileNet)


@pytest.mark.parametrize("name", ["mobilenetv2_050", "mobilenetv4_conv_small"])
def test_receptive_fields_are_the_measured_ones(name):
    model = randomize(MobileNet(name, BackboneOptions(features_only=True))).eval()
    stated = [level.receptive_field for level in model.all_levels[:3]]
    assert stated == [against_timm.measured_receptive_field(model, level, side=96) for level in range(3)]


def test_a_dilated_receptive_field_is_the_measured_one():
    model = randomize(MobileNet("mobilenetv2_050", BackboneOptions(features_only=True, output_stride=8))).eval()
    assert model.all_levels[3].receptive_field == against_timm.measured_receptive_field(model, 3, side=288)


def test_squeeze_and_excitation_sees_the_whole_image():
    model = randomize(MobileNet("mobilenetv3_small_075", BackboneOptions(features_only=True))).eval()
    assert [level.receptive_field for level in model.feature_info] == [3, 0, 0, 0, 0]
    assert against_timm.measured_receptive_field(model, 1, side=96) == 96


def test_gradients_survive_checkpointing():
    against_timm.assert_gradients_survive_checkpointing(MobileNet, "mobilenetv3_small_075")


@pytest.mark.slow
@pytest.mark.parametrize("name", GENERATIONS)
def test_exports_with_a_dynamic_batch(tmp_path, name):
    against_timm.assert_exports(MobileNet, name, tmp_path / "mobilenet.onnx")


def test_a_shallow_level_does_not_run_the_deep_stages():
    model = MobileNet("mobilenetv2_050", BackboneOptions(features_only=True, output_indices=(1,))).eval()
    model.blocks[2].register_forward_hook(lambda *_: pytest.fail("blocks.2 ran"))
    assert list(model(torch.randn(1, 3, 64, 64))) == ["stage1"]
