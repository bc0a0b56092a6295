"""Plain ViTs against timm, at other image and patch sizes, as pyramids, and as graphs."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from deploykit.backbones.base import BackboneOptions
from deploykit.backbones.vit import VARIANTS, VisionTransformer
from deploykit.errors import SpecError
from tests.backbones import against_timm, transformers
from tests.backbones.against_timm import assert_close
from tests.backbones.realistic import randomize

TINY = "vit_tiny_patch16_224"
TRANSFORMER_OPS = {
    "Add", "MatMul", "Reshape", "Transpose", "LayerNormalization", "Split", "Mul", "Softmax", "Gelu", "Slice", "Conv",
    "Pad", "Gather", "Gemm",
}  # fmt: skip


def other_size(name):
    patch = VARIANTS[name].patch
    return (5 * patch, 3 * patch)


class Shallow(VisionTransformer):
    """The same variants with four blocks: what differs between them is not their depth."""

    variants = {name: replace(variant, depth=4) for name, variant in VARIANTS.items()}  # noqa: RUF012


@pytest.mark.parametrize(
    "name",
    [TINY, "deit3_small_patch16_224", "vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2"],
)
def test_four_blocks_are_timms(timm, name):
    transformers.assert_equals_timm(timm, Shallow, name, other_size(name), depth=4)


@pytest.mark.parametrize("name", against_timm.variants(VARIANTS, fast=()))
def test_everything_is_timms_at_a_rectangular_size(timm, name):
    transformers.assert_equals_timm(timm, VisionTransformer, name, other_size(name))


@pytest.mark.parametrize("name", against_timm.variants(VARIANTS, fast=()))
def test_everything_is_timms_at_the_native_size(timm, name):
    transformers.assert_equals_timm(timm, VisionTransformer, name)


def test_default_weights_and_preprocessing_are_timms(timm):
    against_timm.assert_sources_are_timms(timm, VisionTransformer)


@pytest.mark.parametrize(
    ("name", "size", "patch"),
    [
        (TINY, (96, 160), None),
        (TINY, (224, 224), 32),
        (TINY, (96, 48), 12),
        ("deit3_small_patch16_224", (64, 96), 8),
        ("vit_small_patch14_reg4_dinov2", (70, 112), None),
    ],
)
def test_a_native_checkpoint_is_resampled_as_timm_does(timm, name, size, patch):
    reference = randomize(timm.create_model(name, num_classes=10, depth=4)).eval()
    model = Shallow(name, BackboneOptions(num_classes=10, image_size=size, patch_size=patch)).eval()
    model.load_state_dict(model.adapt_state_dict(reference.state_dict()), strict=True)
    reference.set_input_size(img_size=size, patch_size=None if patch is None else (patch, patch))
    images = torch.randn(1, 3, *size)
    with torch.no_grad():
        assert_close(model(images), reference(images))


def test_a_checkpoint_of_the_same_size_is_not_resampled():
    saved = transformers.build(Shallow, TINY, image_size=(48, 80)).state_dict()
    adapted = Shallow(TINY, BackboneOptions(image_size=(48, 80))).adapt_state_dict(saved)
    assert all(torch.equal(adapted[name], value) for name, value in saved.items())


def test_a_checkpoint_without_a_classifier_loads_as_the_embedding_and_is_never_given_one(tmp_path):
    trunk = Shallow(TINY, BackboneOptions(num_classes=0, image_size=(32, 48))).state_dict()
    assert trunk.keys() == Shallow(TINY, BackboneOptions(num_classes=0)).adapt_state_dict(trunk).keys()
    classifier = Shallow(TINY, BackboneOptions(image_size=(32, 48)))
    assert "head.weight" not in classifier.adapt_state_dict(trunk)


@pytest.mark.parametrize(("name", "side"), [(TINY, 64), (TINY, 384), ("vit_small_patch14_reg4_dinov2", 70)])
def test_the_image_size_is_read_from_the_position_embeddings(name, side):
    saved = Shallow(name, BackboneOptions(image_size=(side, side))).state_dict()
    model = Shallow(name, BackboneOptions())
    assert model.image_size_in(saved) == (side, side)
    assert model.image_size_in(model.state_dict()) is None
    assert Shallow(name, BackboneOptions(patch_size=8, image_size=(64, 64))).image_size_in(saved) == (side, side)
    assert model.image_size_in({}) is None


def test_levels_are_blocks_and_the_last_three_are_the_default():
    model = VisionTransformer(TINY, BackboneOptions(features_only=True, image_size=(32, 48)))
    assert [(level.name, level.index, level.stride, level.receptive_field) for level in model.feature_info] == [
        ("block9", 9, 16, 0),
        ("block10", 10, 16, 0),
        ("block11", 11, 16, 0),
    ]
    chosen = VisionTransformer(TINY, BackboneOptions(features_only=True, image_size=(32, 48), output_indices=(7, 2)))
    assert chosen.feature_info.names() == ["block2", "block7"]
    chosen.blocks[8].register_forward_hook(lambda *_: pytest.fail("block8 ran"))
    assert {name: tuple(feature.shape) for name, feature in chosen(torch.randn(1, 3, 32, 48)).items()} == {
        "block2": (1, 192, 2, 3),
        "block7": (1, 192, 2, 3),
    }


def test_logits_are_the_same_in_training_and_beside_the_features():
    model = transformers.build(VisionTransformer, TINY, image_size=(32, 48))
    images = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        logits = model(images)
        assert_close(model.forward_everything(images)["logits"], logits)
        assert_close(model.train()(images), logits)


@pytest.mark.parametrize(("patch", "size"), [(16, (96, 160)), (16, (80, 48)), (8, (64, 32)), (32, (64, 96))])
def test_the_pyramid_has_strides_4_to_32(patch, size):
    model = transformers.build(
        VisionTransformer, TINY, hierarchical=True, features_only=True, image_size=size, patch_size=patch
    )
    assert model.feature_info.names() == ["stage1", "stage2", "stage3", "stage4"]
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    features = model(torch.randn(1, 3, *size))
    for level in model.feature_info:
        shape = (level.channels, *(-(-side // level.stride) for side in size))
        assert tuple(features[level.name].shape[1:]) == shape


def test_the_pyramid_is_made_of_evenly_spaced_blocks():
    pyramid = transformers.build(VisionTransformer, TINY, hierarchical=True, features_only=True, image_size=(64, 64))
    blocks = VisionTransformer(
        TINY, BackboneOptions(features_only=True, image_size=(64, 64), output_indices=(2, 5, 8, 11))
    ).eval()
    blocks.load_state_dict(pyramid.state_dict(), strict=True)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        levels, maps = pyramid(images), blocks(images)
    for level, block, factor in (("stage1", "block2", 4), ("stage2", "block5", 2)):
        assert_close(levels[level], F.interpolate(maps[block], scale_factor=factor, mode="bilinear"))
    assert torch.equal(levels["stage3"], maps["block8"])
    assert torch.equal(levels["stage4"], F.avg_pool2d(maps["block11"], 2))


def test_the_simple_feature_pyramid_keeps_its_own_parameters_beside_timms(timm):
    name, options = TINY, {"hierarchical": "simple_feature_pyramid", "features_only": True, "image_size": (80, 96)}
    model = VisionTransformer(name, BackboneOptions(**options)).eval()
    weights = timm.create_model(name).state_dict()
    extra = {key for key in model.state_dict() if key not in weights}
    assert extra and all(key.startswith("pyramid.") for key in extra)
    model.load_state_dict(model.adapt_state_dict(weights), strict=True)
    assert torch.equal(model.state_dict()["blocks.3.attn.qkv.weight"], weights["blocks.3.attn.qkv.weight"])
    features = model(torch.randn(1, 3, 80, 96))
    assert [tuple(feature.shape[1:]) for feature in features.values()] == [
        (256, 20, 24),
        (256, 10, 12),
        (256, 5, 6),
        (256, 3, 3),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": (100, 64)}, r"multiple.*\(96, 64\)"),
        ({"image_size": (60, 60), "patch_size": 12, "hierarchical": True}, "patch_size=16"),
        ({"patch_size": 8, "hierarchical": "simple_feature_pyramid"}, "patch_size=16"),
        ({"output_stride": 8}, "patch"),
        ({"output_indices": (12,)}, "block11"),
    ],
)
def test_options_that_it_cannot_make_are_refused(options, message):
    with pytest.raises(SpecError, match=message):
        VisionTransformer(TINY, BackboneOptions(**options))


def test_an_unknown_pyramid_is_refused():
    with pytest.raises(SpecError, match="simple_feature_pyramid"):
        BackboneOptions(hierarchical="fpn")


def test_images_of_another_size_are_refused():
    model = VisionTransformer(TINY, BackboneOptions(image_size=(32, 48)))
    with pytest.raises(SpecError, match="32, 48"):
        model(torch.randn(1, 3, 48, 32))


def test_gradients_survive_checkpointing():
    transformers.assert_gradients_survive_checkpointing(Shallow, TINY, image_size=(32, 48), num_classes=10)


def test_freezing_takes_the_tokens_and_positions_along():
    model = VisionTransformer("vit_small_patch14_reg4_dinov2", BackboneOptions(image_size=(28, 28), num_classes=2))
    model.freeze("block3")
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert {"cls_token", "reg_token", "pos_embed", "patch_embed.proj.weight", "blocks.3.norm1.weight"} <= frozen
    assert not any(name.startswith(("blocks.4", "norm", "head")) for name in frozen)
    model.freeze(None)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_graphs_constants_follow_the_parameters():
    model = transformers.build(VisionTransformer, TINY, image_size=(32, 48))
    fresh = VisionTransformer(TINY, BackboneOptions(image_size=(32, 48))).eval()
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(fresh.get_buffer("places"), fresh.graph_constants()["places"])
    with torch.no_grad():
        model.pos_embed.add_(1.0)
    assert torch.equal(model.eval().get_buffer("places"), model.graph_constants()["places"])


def test_exports_with_a_dynamic_batch(tmp_path):
    model = transformers.build(Shallow, TINY, image_size=(48, 80), output_indices=(1, 3))
    transformers.assert_exports(model, tmp_path / "vit.onnx", TRANSFORMER_OPS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pyramid", "ops"),
    [
        (True, {"Resize", "AveragePool"}),
        ("simple_feature_pyramid", {"ConvTranspose", "MaxPool"}),
    ],
)
def test_pyramids_export_with_a_dynamic_batch(tmp_path, pyramid, ops):
    model = transformers.build(Shallow, TINY, image_size=(80, 48), hierarchical=pyramid, features_only=True)
    transformers.assert_exports(model, tmp_path / "vit.onnx", TRANSFORMER_OPS | ops)
