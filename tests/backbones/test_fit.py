"""A checkpoint of the user's own: classes, channels and size are read from it, and nothing of it is lost unasked."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from safetensors.torch import save_file

from deploykit import create_backbone
from deploykit.backbones.base import BackboneOptions
from deploykit.backbones.registry import build
from deploykit.backbones.weights import load_pretrained
from deploykit.errors import SpecError, WeightsError, WeightsWarning
from deploykit.spec import Preprocessing
from tests.backbones.realistic import randomize

NAME = "mobilenetv3_small_075"
VIT = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def trained():
    """A network of 10 classes, with weights that differ from any fresh initialisation."""
    torch.manual_seed(0)
    return randomize(build(NAME, BackboneOptions(num_classes=10))).eval()


@pytest.fixture
def save(tmp_path):
    """Write a state dict, or a whole content, and return the file."""

    def write(content, name="mine.pth"):
        path = tmp_path / name
        save_file(content, str(path)) if name.endswith(".safetensors") else torch.save(content, path)
        return path

    return write


def same_weights(model, other):
    own, expected = model.state_dict(), other.state_dict()
    return own.keys() == expected.keys() and all(torch.equal(own[name], expected[name]) for name in own)


# Classes.


@pytest.mark.parametrize("options", [{}, {"num_classes": 10}, {"features_only": True}, {"image_size": 64}])
def test_the_classes_of_the_file_are_taken_where_none_are_asked_for(save, trained, options):
    model = create_backbone(NAME, pretrained=save(trained.state_dict()), **options)
    assert model.spec.num_classes == 10
    assert same_weights(model, trained)


@pytest.mark.parametrize("asked", [1000, 9, 1])
def test_other_classes_than_the_files_are_refused_with_both_numbers(save, trained, asked):
    with pytest.raises(
        WeightsError, match=rf"for 10 classes \(classifier\.weight \(10, 1024\)\), and num_classes={asked}"
    ):
        create_backbone(NAME, pretrained=save(trained.state_dict()), num_classes=asked)


def test_a_new_head_is_drawn_only_when_it_is_asked_for_by_name(save, trained):
    path = save(trained.state_dict())
    model = create_backbone(NAME, pretrained=path, num_classes=10, new_head=True)
    assert not torch.equal(model.classifier.weight, trained.classifier.weight)
    assert torch.equal(model.conv_head.weight, trained.conv_head.weight)
    with pytest.raises(SpecError, match=r"say for how many classes with num_classes="):
        create_backbone(NAME, pretrained=path, new_head=True)


def test_the_embedding_leaves_the_classifier_out_because_that_is_what_was_asked_for(save, trained):
    model = create_backbone(NAME, pretrained=save(trained.state_dict()), num_classes=0)
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(trained.classifier(model(images)), trained(images))


def without_head(model):
    return {name: value for name, value in model.state_dict().items() if not name.startswith("classifier.")}


def test_a_file_of_the_trunk_gives_the_embedding_and_says_so(save, trained):
    path = save(without_head(trained))
    with pytest.warns(WeightsWarning, match=r"no classifier \(classifier\.weight and classifier\.bias are missing\)"):
        assert create_backbone(NAME, pretrained=path).spec.num_classes == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        create_backbone(NAME, pretrained=path, num_classes=0)
        create_backbone(NAME, pretrained=path, features_only=True)
    with pytest.raises(WeightsError, match=r"no classifier .*num_classes=10 was asked for.*new_head=True"):
        create_backbone(NAME, pretrained=path, num_classes=10)
    assert create_backbone(NAME, pretrained=path, num_classes=10, new_head=True).spec.num_classes == 10


def test_a_head_outside_of_the_backbone_is_not_left_out_silently(save, trained):
    content = {f"backbone.{name}": value for name, value in without_head(trained).items()}
    content |= {"head.weight": torch.ones(10, 1024), "head.bias": torch.ones(10)}
    path = save({"state_dict": content})
    with pytest.raises(WeightsError, match=r"Beside it stands head\.weight \(10, 1024\).*num_classes=0"):
        create_backbone(NAME, pretrained=path)
    with pytest.warns(WeightsWarning, match=r"2 tensors outside of the backbone .*head\.weight \(10, 1024\)"):
        assert create_backbone(NAME, pretrained=path, num_classes=0).spec.num_classes == 0


def test_a_head_of_several_layers_is_not_left_out_silently(save, trained):
    content = without_head(trained) | {"classifier.1.weight": torch.ones(10, 1024), "classifier.1.bias": torch.ones(10)}
    path = save({"state_dict": content})
    for options in ({}, {"checkpoint_key": "state_dict"}, {"num_classes": 10}):
        with pytest.raises(WeightsError, match=r"Beside it stands classifier\.1\.weight \(10, 1024\)"):
            create_backbone(NAME, pretrained=path, **options)
    assert create_backbone(NAME, pretrained=path, num_classes=0).spec.num_classes == 0
    assert create_backbone(NAME, pretrained=path, features_only=True).spec.features_only
    new = create_backbone(NAME, pretrained=path, num_classes=3, new_head=True)
    assert torch.equal(new.conv_stem.weight, trained.conv_stem.weight)


def test_tensors_of_the_loss_are_named_as_left_out(save, trained):
    content = {f"model.{name}": value for name, value in trained.state_dict().items()}
    path = save({"state_dict": {**content, "criterion.weight": torch.ones(10)}, "epoch": 3}, "last.ckpt")
    with pytest.warns(
        WeightsWarning, match=r"1 tensors outside of the backbone in state_dict\.model.*criterion\.weight"
    ):
        assert same_weights(create_backbone(NAME, pretrained=path), trained)


def test_weights_loaded_later_are_held_to_the_same_rules(save, trained):
    path = save(trained.state_dict())
    model = build(NAME, BackboneOptions(num_classes=7))
    with pytest.raises(WeightsError, match=r"10 classes.*num_classes=7"):
        load_pretrained(model, path)
    before = model.classifier.weight.clone()
    load_pretrained(model, path, new_head=True)
    assert torch.equal(model.classifier.weight, before)
    assert torch.equal(model.conv_stem.weight, trained.conv_stem.weight)


# Channels and sizes.


@pytest.fixture(scope="module")
def gray():
    return randomize(build(NAME, BackboneOptions(num_classes=10, in_channels=1))).eval()


def test_the_channels_of_the_file_are_taken_where_none_are_asked_for(save, gray):
    model = create_backbone(NAME, pretrained=save(gray.state_dict()))
    assert (model.spec.in_channels, model.input_spec.channels) == (1, 1)
    assert same_weights(model, gray)


@pytest.mark.parametrize("asked", [3, 4])
def test_weights_for_other_channels_than_rgb_are_not_adapted(save, gray, asked):
    with pytest.raises(WeightsError, match=rf"images of 1 channels, and in_channels={asked} was asked for"):
        create_backbone(NAME, pretrained=save(gray.state_dict()), in_channels=asked)


def test_the_size_of_a_vision_transformer_is_read_from_its_positions(save):
    saved = build(VIT, BackboneOptions(num_classes=3, image_size=(64, 64))).eval()
    model = create_backbone(VIT, pretrained=save(saved.state_dict()))
    assert (model.spec.image_size, model.spec.num_classes) == ((64, 64), 3)
    assert same_weights(model, saved)
    assert create_backbone(VIT, pretrained=save(saved.state_dict()), image_size=96).spec.image_size == (96, 96)


# Values.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_become_float32(save, trained, dtype):
    state = {
        name: value.to(dtype) if value.is_floating_point() else value for name, value in trained.state_dict().items()
    }
    model = create_backbone(NAME, pretrained=save(state, "half.safetensors"))
    assert {value.dtype for value in model.state_dict().values()} <= {torch.float32, torch.int64}
    torch.testing.assert_close(model.conv_stem.weight, trained.conv_stem.weight, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(10, 1024, dtype=torch.int8), r"of another kind: classifier\.weight int8 instead of float32"),
        (torch.ones(10, 1024).to_sparse(), r"classifier\.weight sparse_coo float32 instead of float32"),
        (torch.ones(10, 1024, device="meta"), r"classifier\.weight without values float32"),
        (torch.full((10, 1024), 1e300, dtype=torch.float64), r"with NaN or infinity: classifier\.weight"),
        (torch.ones(10, 1024, dtype=torch.complex64), r"classifier\.weight complex64"),
    ],
    ids=["int8", "sparse", "meta", "overflow", "complex"],
)
def test_values_that_a_float_network_cannot_have_are_refused(save, trained, value, message):
    with pytest.raises(WeightsError, match=message):
        create_backbone(NAME, pretrained=save({**trained.state_dict(), "classifier.weight": value}))


def test_a_negative_variance_is_refused(save, trained):
    state = {**trained.state_dict(), "bn1.running_var": -torch.ones_like(trained.bn1.running_var)}
    with pytest.raises(WeightsError, match=r"1 with a negative variance: bn1\.running_var"):
        create_backbone(NAME, pretrained=save(state))


def test_counters_of_a_profiler_are_no_fault(save, trained):
    profiled = {"total_ops": torch.zeros(1, dtype=torch.float64), "conv_stem.total_params": torch.zeros(1)}
    assert same_weights(create_backbone(NAME, pretrained=save({**trained.state_dict(), **profiled})), trained)


def test_averages_without_their_statistics_name_the_raw_weights(save, trained):
    parameters = {name: value.detach() for name, value in trained.named_parameters()}
    path = save({"model": trained.state_dict(), "model_ema": parameters})
    with pytest.warns(WeightsWarning), pytest.raises(WeightsError, match=r"running_mean.*also holds model: choose"):
        create_backbone(NAME, pretrained=path)
    assert same_weights(create_backbone(NAME, pretrained=path, checkpoint_key="model"), trained)


# What the file says of itself.

CONFIG = {
    "architecture": NAME,
    "num_classes": 10,
    "label_names": [f"digit {number}" for number in range(10)],
    "pretrained_cfg": {"mean": [0.1] * 3, "std": [0.2] * 3, "crop_pct": 1.0, "input_size": [3, 64, 64]},
}


def beside(path, config):
    (path.parent / "config.json").write_text(json.dumps(config))
    return path


def test_a_configuration_decides_labels_preprocessing_and_size(save, trained):
    model = create_backbone(NAME, pretrained=beside(save(trained.state_dict()), CONFIG))
    assert model.labels == tuple(CONFIG["label_names"])
    assert model.input_spec.preprocessing == Preprocessing(mean=(0.1,) * 3, std=(0.2,) * 3, crop_pct=1.0)
    assert (model.spec.image_size, model.guesses_preprocessing) == ((64, 64), False)


def test_what_is_asked_for_goes_before_what_the_file_says(save, trained):
    path = beside(save(trained.state_dict()), CONFIG)
    names = [str(number) for number in range(10)]
    model = create_backbone(NAME, pretrained=path, labels=names, preprocessing={"crop_pct": 0.5}, image_size=32)
    assert model.labels == tuple(names)
    assert model.input_spec.preprocessing == Preprocessing(mean=(0.1,) * 3, std=(0.2,) * 3, crop_pct=0.5)
    assert model.spec.image_size == (32, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "resnet18.a1_in1k"}, r"is a checkpoint of resnet18, as .*config\.json says, and mobilenetv3"),
        ({"num_classes": 1000}, r"num_classes=1000, and the classifier in mine\.pth has 10"),
        ({"label_names": ["a", "b"]}, r"names 2 classes, and the classifier in mine\.pth has 10"),
    ],
)
def test_a_configuration_that_contradicts_the_file_is_refused(save, trained, change, message):
    with pytest.raises(WeightsError, match=message):
        create_backbone(NAME, pretrained=beside(save(trained.state_dict()), CONFIG | change))


def test_the_architecture_in_a_torch_file_is_compared_too(save):
    other = build("efficientnet_b0", BackboneOptions(num_classes=2)).state_dict()
    path = save({"arch": "tf_efficientnet_b0", "state_dict": other})
    with pytest.raises(WeightsError, match="is a checkpoint of tf_efficientnet_b0"):
        create_backbone("efficientnet_b0", pretrained=path)
    assert create_backbone("tf_efficientnet_b0", pretrained=path).spec.num_classes == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": ["a", "b"]}, "2 labels and the classifier has 10 classes"),
        ({"labels": ["a"], "num_classes": 0}, "has no classes"),
        ({"labels": "absent.txt"}, "cannot be read"),
        ({"preprocessing": Preprocessing(mean=(0.5,), std=(0.5,))}, "for 1 channels"),
        ({"preprocessing": {"means": 1}}, "no field 'means'.*Did you mean 'mean'"),
        ({"preprocessing": "timm"}, "preprocessing is 'timm'.*expected a Preprocessing"),
        ({"num_classes": "10"}, "num_classes is '10'.*expected a whole number"),
        ({"num_classes": True}, "num_classes is True.*expected a whole number"),
        ({"output_indices": 3}, "output_indices is 3"),
        ({"features_only": 1}, "features_only is 1.*expected True or False"),
        ({"checkpoint_key": 3}, "checkpoint_key is 3"),
        ({"image_size": 3.5}, r"image_size is 3\.5"),
        ({"image_size": "big"}, "image_size is 'big'"),
        ({"preprocessing": {"mean": "grey"}}, "cannot be"),
        ({"preprocessing": {"crop_pct": "all"}}, "cannot be"),
        ({"name": 3}, "expected a backbone's name, a module, or the path of a bundle"),
        ({"name": None}, "expected a backbone's name, a module"),
    ],
)
def test_options_that_cannot_be_are_spec_errors(save, trained, options, message):
    with pytest.raises(SpecError, match=message):
        create_backbone(**{"name": NAME, "pretrained": save(trained.state_dict())} | options)


def test_labels_and_preprocessing_go_on_a_copy_of_a_backbone(trained):
    names = [str(number) for number in range(10)]
    model = create_backbone(trained, labels=names, preprocessing=Preprocessing(crop_pct=0.5))
    assert (model.labels, model.input_spec.preprocessing.crop_pct) == (tuple(names), 0.5)
    assert (trained.labels, trained.input_spec.preprocessing.crop_pct) == (None, 0.875)
    assert model.classifier.weight is trained.classifier.weight
