"""timm/<name> against timm itself."""

import importlib.metadata
import sys

import pytest
import torch

from deploykit import create_backbone
from deploykit.backbones.base import BackboneOptions
from deploykit.backbones.timm_models import build_timm
from deploykit.errors import MissingDependency, SpecError, WeightsError
from tests.backbones.realistic import randomize

PYRAMID = [(0, "stem", 2), (1, "stage1", 4), (2, "stage2", 8), (3, "stage3", 16), (4, "stage4", 32)]


def indices_names_strides(backbone):
    return [(level.index, level.name, level.stride) for level in backbone.feature_info]


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "ghostnet_050"])
def test_timm_pyramid_gives_timms_features_and_logits(timm, name):
    backbone = build_timm(f"timm/{name}", BackboneOptions(image_size=(64, 96)))
    reference = timm.create_model(name, features_only=True).eval()
    weights = {key.replace(".", "_"): value for key, value in backbone.model.state_dict().items()}
    reference.load_state_dict({key: weights[key.replace(".", "_")] for key in reference.state_dict()})
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        outputs = backbone.forward_everything(images)
        logits, expected = backbone.model(images), reference(images)
    assert indices_names_strides(backbone) == PYRAMID
    assert backbone.feature_info.channels() == reference.feature_info.channels()
    torch.testing.assert_close(outputs.pop("logits"), logits)
    for ours, theirs in zip(outputs.values(), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_timm_transformer_levels_are_its_last_blocks_at_another_size(timm):
    options = BackboneOptions(features_only=True, image_size=(64, 96))
    backbone = build_timm("timm/vit_tiny_patch16_224", options)
    features = backbone(torch.randn(1, 3, 64, 96))
    assert list(features) == ["block9", "block10", "block11"]
    assert {tuple(feature.shape) for feature in features.values()} == {(1, 192, 4, 6)}
    with pytest.raises(SpecError, match="expected"):
        backbone(torch.randn(1, 3, 96, 64))


def test_timm_selected_levels_stop_the_trunk_early(timm):
    backbone = build_timm("timm/resnet18", BackboneOptions(features_only=True, output_indices=(1, 2)))
    runs = []
    backbone.model.layer3.register_forward_hook(lambda *_: runs.append("layer3"))
    assert list(backbone(torch.randn(1, 3, 64, 64))) == ["stage1", "stage2"]
    assert runs == []


def test_timm_input_spec_is_timms_data_config(timm):
    preprocessing = build_timm("timm/tf_efficientnet_lite0", BackboneOptions()).input_spec.preprocessing
    assert (preprocessing.mean, preprocessing.std) == ((0.5,) * 3, (0.5,) * 3)
    assert (preprocessing.interpolation, preprocessing.crop_pct) == ("bicubic", 0.875)


def test_timm_stages_freeze_up_to_a_level(timm):
    backbone = build_timm("timm/resnet18", BackboneOptions())
    backbone.freeze("stage2")
    free = {name.split(".")[0] for name, weight in backbone.model.named_parameters() if weight.requires_grad}
    assert free == {"layer3", "layer4", "fc"}


def test_timm_options_reach_the_model(timm):
    backbone = build_timm("timm/resnet18", BackboneOptions(in_channels=1, num_classes=0, output_stride=8))
    assert backbone(torch.randn(1, 1, 64, 64)).shape == (1, 512)
    assert backbone.feature_info.reduction() == [2, 4, 8, 8, 8]
    assert [level.index for level in backbone.feature_info] == [0, 1, 2, 3, 4]


def test_timm_checkpoint_file_is_loaded(timm, tmp_path):
    trained = build_timm("timm/resnet18", BackboneOptions())
    torch.save(trained.model.state_dict(), tmp_path / "mine.pth")
    backbone = build_timm("timm/resnet18", BackboneOptions(), tmp_path / "mine.pth")
    assert torch.equal(backbone.model.conv1.weight, trained.model.conv1.weight)
    assert backbone.spec.weights == "mine.pth"


@pytest.mark.parametrize(
    ("name", "options", "pretrained", "error", "message"),
    [
        ("timm/resnet5", {}, False, SpecError, "resnet50"),
        ("timm/resnet18.nope", {}, False, SpecError, "a1_in1k"),
        ("timm/resnet18", {}, "a1_in2k", SpecError, "a1_in1k"),
        ("timm/resnet18", {"hierarchical": True}, False, SpecError, "plain ViT"),
        ("timm/vit_tiny_patch16_224", {"output_stride": 8}, False, SpecError, "output_stride"),
        ("timm/resnet18", {"output_indices": (7,)}, False, SpecError, "stage4"),
        ("timm/resnet18", {}, "absent/mine.pth", WeightsError, "no file"),
    ],
)
@pytest.mark.usefixtures("timm")
def test_timm_refusals_say_what_to_do(name, options, pretrained, error, message):
    with pytest.raises(error, match=message):
        build_timm(name, BackboneOptions(**options), pretrained)


def test_timm_absent_names_the_pip_command(monkeypatch):
    for module in [name for name in sys.modules if name.partition(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "meta_path", [_NoTimm(), *sys.meta_path])
    monkeypatch.setattr(importlib.metadata, "version", _version_without_timm(importlib.metadata.version))
    with pytest.raises(MissingDependency, match=r"pip install timm"):
        build_timm("timm/resnet18", BackboneOptions())


def _version_without_timm(version):
    """Hide the record of the installation too: files that are gone while it stays are a damaged package."""

    def find(distribution):
        if distribution == "timm":
            raise importlib.metadata.PackageNotFoundError(distribution)
        return version(distribution)

    return find


class _NoTimm:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "timm":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


# Checkpoints of the user's own.

SMALL, SMALL_VIT = "timm/test_resnet", "timm/test_vit"


@pytest.fixture
def saved(timm, tmp_path):
    """Write the state dict of a timm model with other weights than a fresh one's, and return the file and the model."""

    def write(name, wrap=lambda state: state, **options):
        model = randomize(timm.create_model(name.removeprefix("timm/"), **options)).eval()
        torch.save(wrap(model.state_dict()), tmp_path / "mine.pth")
        return tmp_path / "mine.pth", model

    return write


@pytest.mark.parametrize(
    "wrap", [lambda state: state, lambda state: {"state_dict": {f"module.{key}": state[key] for key in state}}]
)
def test_timm_takes_the_classes_of_a_file_with_its_classifier(saved, wrap):
    path, model = saved(SMALL, wrap, num_classes=10)
    backbone = create_backbone(SMALL, pretrained=path)
    images = torch.randn(2, 3, 64, 64)
    assert backbone.spec.num_classes == 10
    with torch.no_grad():
        assert torch.equal(backbone(images), model(images))


def test_timm_refuses_other_classes_unless_a_new_head_is_asked_for(saved):
    path, model = saved(SMALL, num_classes=10)
    with pytest.raises(WeightsError, match=r"for 10 classes .*num_classes=7 was asked for"):
        create_backbone(SMALL, pretrained=path, num_classes=7)
    backbone = create_backbone(SMALL, pretrained=path, num_classes=7, new_head=True)
    assert backbone.spec.num_classes == 7
    assert torch.equal(next(backbone.model.parameters()), next(model.parameters()))


def test_timm_takes_the_channels_of_a_file(saved):
    path, _ = saved(SMALL, num_classes=10, in_chans=1)
    assert create_backbone(SMALL, pretrained=path).spec.in_channels == 1
    with pytest.raises(WeightsError, match="images of 1 channels, and in_channels=3"):
        create_backbone(SMALL, pretrained=path, in_channels=3)


def test_timm_takes_the_size_of_a_vision_transformer_from_its_positions(saved):
    path, model = saved(SMALL_VIT, num_classes=10, img_size=64)
    backbone = create_backbone(SMALL_VIT, pretrained=path)
    images = torch.randn(1, 3, 64, 64)
    assert backbone.spec.image_size == (64, 64)
    with torch.no_grad():
        assert torch.equal(backbone(images), model(images))


def test_timm_gives_features_of_a_file_without_its_classifier(saved):
    path, _ = saved(SMALL, num_classes=10)
    assert create_backbone(SMALL, pretrained=path, features_only=True).spec.features_only


@pytest.mark.usefixtures("timm")
def test_timms_own_weights_for_other_classes_are_refused_before_they_are_fetched():
    with pytest.raises(WeightsError, match=r"have 1000 classes, and num_classes=10 was asked for"):
        create_backbone("timm/resnet18", pretrained=True, num_classes=10)


def test_timm_checkpoints_the_models_that_can(timm):
    backbone = create_backbone(SMALL)
    images = torch.randn(2, 3, 64, 64)
    backbone.train()
    gradients = []
    for enable in (False, True):
        backbone.set_grad_checkpointing(enable)
        assert backbone.grad_checkpointing is enable
        backbone.zero_grad()
        backbone(images).square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in backbone.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.usefixtures("timm")
def test_timm_says_when_a_model_has_no_checkpointing():
    backbone = create_backbone("timm/crossvit_9_240")
    with pytest.raises(SpecError, match=r"crossvit_9_240 has no gradient checkpointing in timm \(.*not supported\)"):
        backbone.set_grad_checkpointing()


@pytest.mark.usefixtures("timm")
def test_timm_freezes_tokens_and_positions_with_the_first_level():
    backbone = create_backbone(SMALL_VIT)
    first = backbone.feature_info.names()[0] if backbone.spec.features_only else backbone.all_levels[0].name
    backbone.freeze(first)
    assert not backbone.model.pos_embed.requires_grad
    assert not backbone.model.cls_token.requires_grad
    assert backbone.model.head.weight.requires_grad
    backbone.freeze(None)
    assert all(parameter.requires_grad for parameter in backbone.parameters())


def test_timm_takes_another_patch(timm):
    backbone = create_backbone(SMALL_VIT, patch_size=8, image_size=64, features_only=True)
    reference = timm.create_model(SMALL_VIT.removeprefix("timm/"), patch_size=8, img_size=64, num_classes=0).eval()
    reference.load_state_dict(backbone.model.state_dict())
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = reference.forward_intermediates(images, indices=1, intermediates_only=True)
        (level,) = list(backbone(images).values())[-1:]
    assert level.shape[2:] == (8, 8)
    torch.testing.assert_close(level, expected[-1])


def test_timm_gives_the_state_behind_all_levels_where_none_is_asked_for(timm):
    backbone = create_backbone(SMALL)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        levels, trunk = backbone.forward_levels(images, 0)
        assert levels == []
        torch.testing.assert_close(backbone.forward_head(trunk), backbone(images))


@pytest.mark.usefixtures("timm")
def test_timms_weights_that_cannot_be_fetched_are_told_from_a_model_that_cannot_be_built(monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants", reason="huggingface_hub is not installed")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match=r"timm cannot get the weights of test_resnet: .*Pass a checkpoint file"):
        create_backbone(SMALL, pretrained=True)
    with pytest.raises(SpecError, match=r"timm cannot build test_vit\S* with .*Leave out the option it names"):
        create_backbone(SMALL_VIT, pretrained=True, output_stride=8)
