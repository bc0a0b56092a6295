"""RegNet X and Y against timm, and as graphs."""

import pytest
import torch

from deploykit.backbones.base import BackboneOptions
from deploykit.backbones.regnet import VARIANTS, RegNet
from tests.backbones import against_timm
from tests.backbones.realistic import randomize


@pytest.mark.parametrize("name", against_timm.variants(VARIANTS, fast={"regnetx_002", "regnety_002", "regnety_004"}))
def test_state_dict_logits_features_and_levels_are_timms(timm, name):
    against_timm.assert_equals_timm(timm, RegNet, name)


@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize("name", ["regnety_002"])
def test_dilated_features_are_timms(timm, name, output_stride):
    against_timm.assert_dilates_as_timm(timm, RegNet, name, output_stride)


def test_embedding_is_timms(timm):
    against_timm.assert_embedding_is_timms(timm, RegNet, "regnety_002")


def test_default_weights_and_preprocessing_are_timms(timm):
    against_timm.assert_sources_are_timms(timm, RegNet)


def test_receptive_fields_are_the_measured_ones():
    model = randomize(RegNet("regnetx_008", BackboneOptions(features_only=True))).eval()
    stated = [level.receptive_field for level in model.all_levels[:3]]
    assert stated == [against_timm.measured_receptive_field(model, level, side=96) for level in range(3)]


def test_a_dilated_receptive_field_is_the_measured_one():
    model = randomize(RegNet("regnetx_002", BackboneOptions(features_only=True, output_stride=8))).eval()
    assert model.all_levels[3].receptive_field == against_timm.measured_receptive_field(model, 3, side=192)


def test_squeeze_and_excitation_sees_the_whole_image():
    model = randomize(RegNet("regnety_002", BackboneOptions(features_only=True))).eval()
    assert [level.receptive_field for level in model.feature_info] == [3, 0, 0, 0, 0]
    assert against_timm.measured_receptive_field(model, 1, side=96) == 96


def test_gradients_survive_checkpointing():
    against_timm.assert_gradients_survive_checkpointing(RegNet, "regnety_002")


@pytest.mark.slow
def test_exports_with_a_dynamic_batch(tmp_path):
    against_timm.assert_exports(RegNet, "regnety_002", tmp_path / "regnet.onnx", output_stride=16)


def test_a_shallow_level_does_not_run_the_deep_stages():
    model = RegNet("regnetx_002", BackboneOptions(features_only=True, output_indices=(1,))).eval()
    model.s3.register_forward_hook(lambda *_: pytest.fail("s3 ran"))
    assert list(model(torch.randn(1, 3, 64, 64))) == ["stage1"]
