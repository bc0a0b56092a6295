"""Swin V1 and V2 against timm, and as graphs whose position bias and masks are constants."""

import copy
from typing import ClassVar

import pytest
import torch

from deploykit.backbones.base import BackboneOptions
from deploykit.backbones.swin import VARIANTS, Swin, SwinVariant
from deploykit.errors import SpecError
from tests.backbones import against_timm, channels_last

TINY = "swin_tiny_patch4_window7_224"
REFERENCES = {"v1": TINY, "v2": "swinv2_tiny_window8_256"}


def _small(*, v2):
    return SwinVariant(width=16, depths=(2, 2, 1, 1), heads=(1, 2, 4, 8), window=4, v2=v2, pretrained=None)


class Small(Swin):
    variants: ClassVar = {"v1": _small(v2=False), "v2": _small(v2=True)}


def small(name, image_size=(96, 128), **options):
    return channels_last.realistic(Small(name, BackboneOptions(image_size=image_size, **options))).eval()


def attentions(model):
    return [block.attn for stage in model.layers for block in stage.blocks]


def timms_shape(name):
    """The architecture of a small variant in timm's words."""
    small = Small.variants[name]
    return {
        "embed_dim": small.width,
        "depths": small.depths,
        "num_heads": small.heads,
        "window_size": small.window,
    }


@pytest.mark.parametrize("name", against_timm.variants(VARIANTS, fast={TINY}))
def test_state_dict_logits_features_and_levels_are_timms(timm, name):
    channels_last.assert_equals_timm(timm, Swin, name, VARIANTS[name].pretrained.image_size, sized=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_timms_at_a_rectangular_size_with_padded_and_shrunk_windows(timm, name):
    channels_last.assert_equals_timm(timm, Swin, name, (160, 264), sized=True)


@pytest.mark.parametrize("size", [(128, 128), (96, 64), (76, 100), (102, 230), (36, 260)], ids=str)
@pytest.mark.parametrize("name", ["v1", "v2"])
def test_padded_shrunk_and_rectangular_windows_are_timms(timm, name, size):
    channels_last.assert_equals_timm(
        timm, Small, name, size, sized=True, reference_name=REFERENCES[name], **timms_shape(name)
    )


@pytest.mark.parametrize("name", ["v1", "v2"])
def test_embedding_is_timms(timm, name):
    shape = {"num_classes": 0, "img_size": 64, **timms_shape(name)}
    reference = channels_last.realistic(timm.create_model(REFERENCES[name], **shape)).eval()
    ours = channels_last.load(Small, name, reference.state_dict(), num_classes=0, image_size=(64, 64))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        against_timm.assert_close(ours(images), reference(images))


def test_default_weights_and_preprocessing_are_timms(timm):
    against_timm.assert_sources_are_timms(timm, Swin)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), [("v1", (76, 100)), ("v2", (128, 128))])
def test_exports_with_constant_masks_and_position_bias(name, size, tmp_path):
    model = small(name, size, num_classes=10)
    also = {"Split", "Softmax", "Slice", "Concat"} | ({"ReduceL2", "Clip", "Div"} if name == "v2" else set())
    found = channels_last.assert_exports(
        model, tmp_path / "swin.onnx", also=also | ({"Pad"} if size[0] == 76 else set())
    )
    # A block: queries, keys and values; keys again; windows back. Then levels, merging and patches.
    assert found["Transpose"] == 3 * len(attentions(model)) + 4 + 3 + 1


@pytest.mark.parametrize("name", ["v1", "v2"])
def test_graph_constants_follow_the_weights(name):
    model, other = small(name), channels_last.realistic(Small(name, BackboneOptions(image_size=(96, 128))), seed=1)
    before = attentions(model)[1].score_bias.clone()
    model.load_state_dict(other.state_dict())
    for attention in attentions(model):
        for constant, current in attention.graph_constants().items():
            torch.testing.assert_close(attention.get_buffer(constant), current, rtol=0, atol=0)
    assert not torch.equal(attentions(model)[1].score_bias, before)


@pytest.mark.parametrize("name", ["v1", "v2"])
def test_weights_changed_in_place_count_at_once(name):
    model = small(name)
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for key, parameter in changed.named_parameters():
            if "bias_table" in key or "logit_scale" in key or "cpb_mlp" in key:
                parameter.mul_(2.0)
    fresh = small(name)
    fresh.load_state_dict(changed.state_dict())
    images = torch.randn(1, 3, 96, 128)
    with torch.no_grad():
        assert torch.equal(changed(images), fresh(images))
        assert not torch.allclose(changed(images), model(images))


@pytest.mark.parametrize("name", ["v1", "v2"])
def test_gradients_survive_checkpointing_and_reach_the_position_bias(name):
    model = small(name, num_classes=10).train()
    channels_last.assert_gradients_survive_checkpointing(model, torch.randn(2, 3, 96, 128))
    reached = "relative_position_bias_table" if name == "v1" else "cpb_mlp.0.weight"
    assert attentions(model)[1].get_parameter(reached).grad.abs().sum() > 0


@pytest.mark.parametrize("size", [(96, 128), (76, 100)], ids=["whole windows", "padded windows"])
def test_receptive_fields_are_the_measured_ones(size):
    model = small("v1", size)
    stated = [level.receptive_field for level in model.all_levels[:2]]
    assert stated == [_widest(model, level, size) for level in (0, 1)]


def _widest(model, level, size):
    """The widest interval of rows or columns that a token on the diagonals depends on; 0: all see all."""
    images = torch.randn(1, 3, *size, requires_grad=True)
    features = model.forward_levels(images, level + 1)[0][level]
    rows, columns = features.shape[2:]
    widest, everything = 0, True
    for place in range(max(rows, columns)):
        token = features[0, :, min(place, rows - 1), min(place, columns - 1)].sum()
        (gradient,) = torch.autograd.grad(token, images, retain_graph=True)
        seen = gradient[0].abs().sum(0)
        # A mask of -100 leaves weights of 1e-44, which is nothing seen.
        for axis in (0, 1):
            hit = torch.nonzero(seen.amax(1 - axis) > 1e-12).flatten()
            extent = int(hit[-1] - hit[0] + 1)
            widest, everything = max(widest, extent), everything and extent == size[axis]
    return 0 if everything else widest


def test_smaller_windows_keep_the_bias_of_each_relative_position():
    trained, ours = small("v1", (128, 128)), Small("v1", BackboneOptions(image_size=(64, 96)))
    ours.load_state_dict(ours.adapt_state_dict(trained.state_dict()), strict=True)
    large, cut = attentions(trained)[-1], attentions(ours)[-1]
    assert (large.grid.window, cut.grid.window) == ((4, 4), (2, 3))
    expected = large.graph_constants()["score_bias"].reshape(-1, 4, 4, 4, 4)[:, :2, :3, :2, :3]
    assert torch.equal(cut.graph_constants()["score_bias"].reshape(-1, 2, 3, 2, 3), expected)


def test_another_image_size_than_the_built_one_is_refused():
    with pytest.raises(SpecError, match="96"):
        small("v1")(torch.randn(1, 3, 128, 128))


def test_dilation_is_refused_with_the_reason():
    with pytest.raises(SpecError, match="windows"):
        Swin(TINY, BackboneOptions(output_stride=16))


def test_an_image_smaller_than_a_patch_is_refused():
    with pytest.raises(SpecError, match="at least 4"):
        Swin(TINY, BackboneOptions(image_size=(3, 64)))
